import pytest

import lkarray as lk
from lkarray.analysis.gradients.gradient_kernels import ips, plgk
from lkarray.analysis.gradients.tangent_kernels import lntk
from lkarray.kernels.kinds import INFLUENCE_OPERATOR, require_kernel


def test_require_kernel__refuses_influence_operators_only(G, outputs):
    require_kernel(plgk(G), "this")
    with pytest.raises(
        ValueError, match="this needs a kernel, and 'lntk' is an influence operator"
    ):
        require_kernel(lntk(G, outputs), "this")


def test_embed__refuses_an_influence_operator(G):
    square = ips(G).compute().assign_attrs(kernel=INFLUENCE_OPERATOR)
    with pytest.raises(ValueError, match="embed needs a kernel"):
        lk.embed(square)
