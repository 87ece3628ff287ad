"""What every report of a study must hold."""

import json

from matplotlib.image import imread


def check_report(folder, figures):
    page = (folder / "report/index.html").read_text()
    for name in figures:
        assert f'src="{name}.png"' in page
        assert imread(folder / f"report/{name}.png").std() > 0.05
    return json.loads((folder / "report/metrics.json").read_text())
