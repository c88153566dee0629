"""Packed kernels beside bitsandbytes' own, on a CPU."""

import jax
import numpy as np
import pytest

from jaxsft import quant

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("bitsandbytes").functional


def test_the_levels_are_those_of_bitsandbytes(theirs):
    np.testing.assert_array_equal(quant.NF4, theirs.get_4bit_type("nf4", device="cpu").numpy(), strict=True)
    np.testing.assert_allclose(quant.DYNAMIC, theirs.create_dynamic_map().numpy(), rtol=2e-7)


@pytest.mark.parametrize("shape", [(128, 96), (448, 192), (1024, 300)], ids=str)
def test_codes_blocks_and_groups_are_those_of_bitsandbytes(theirs, shape):
    w = (0.02 * np.random.default_rng(1).standard_t(4, shape)).astype(np.float32)
    stored = torch.tensor(np.ascontiguousarray(w.T))  # as torch has it: [out, in]
    codes, state = theirs.quantize_4bit(stored, blocksize=64, compress_statistics=True, quant_type="nf4")
    packed = jax.device_get(quant.pack(w, "nf4"))
    np.testing.assert_array_equal(packed["codes"], codes.numpy().reshape(shape[1], -1).T)
    absmax = state.absmax.numpy().reshape(shape[1], -1).T.astype(int)
    # Their levels are computed in float32 and ours in float64: a few absmaxes lie between two levels either way.
    assert np.abs(packed["absmax"].astype(int) - absmax).max() <= 1
    assert np.mean(packed["absmax"] != absmax) < 0.01
    np.testing.assert_allclose(packed["absmax_scale"], state.state2.absmax.numpy(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(packed["absmax_mean"], float(state.offset), rtol=1e-6)
    again = theirs.dequantize_4bit(codes, state).numpy().T
    between = 0.015 * packed["absmax_scale"].max()  # two neighbouring levels
    np.testing.assert_allclose(quant.unpack(packed), again, rtol=0, atol=between)
