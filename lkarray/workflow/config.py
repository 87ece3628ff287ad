"""Typed settings of a study, with presets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from lkarray.errors import SettingsError


class Config(BaseModel):
    """Settings of a study: a subclass declares fields with types, limits and descriptions.

    ``presets`` names other sets of values; ``default`` and ``laptop`` are the fields' own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def inherited(cls, settings: Mapping[str, str]) -> Mapping[str, Any]:
        """Return values that some ``settings`` bring along, such as those of a run they name.

        They stand above a preset's, and below the settings themselves.
        """
        return {}

    @classmethod
    def build(cls, preset: str = "default", settings: Iterable[str] = ()) -> Self:
        """Return the settings of a preset, with ``key=value`` strings on top.

        Raises
        ------
        SettingsError
            The preset or a key is unknown, or a value does not fit its field.
        """
        known = {"default": {}, "laptop": {}, **cls.presets}
        if preset not in known:
            raise SettingsError(f"preset {preset!r} is not one of {sorted(known)}")
        given: dict[str, str] = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals:
                raise SettingsError(f"setting {setting!r} is not of the form key=value")
            if key not in cls.model_fields:
                raise SettingsError(f"setting {key!r} is not one of {sorted(cls.model_fields)}")
            given[key] = value
        try:
            return cls.model_validate({**known[preset], **cls.inherited(given), **given})
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}"
                if e["loc"]
                else e["msg"].removeprefix("Value error, ")  # of several settings together
                for e in error.errors()
            )
            raise SettingsError(f"settings do not fit: {wrong}") from None
