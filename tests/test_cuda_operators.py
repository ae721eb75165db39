"""torch's CUDA operators as far as they can be checked without CUDA: choice, arguments, shapes, arithmetic around them."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from test_kernels import BANDS, assert_same, block, both_passes
from torch._subclasses.fake_tensor import FakeTensorMode

from ringattn.kernels import Operands, Options, Rows, aten, choice, get, sdpa
from ringattn.kernels.choice import CallShape, Facts, call_width, operator, version
from ringattn.kernels.pick import obstacle, resolved
from ringattn.mask import Band
from ringattn.pieces import CAUSAL, FULL, Piece

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HOPPER = Facts((9, 0), 91900, (2, 11), (13, 0))
CUDA = torch.device("cuda", 0)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Fake tensors on "cuda" are taken to be on a GPU with these facts."""

    def put(**changes: object) -> None:
        monkeypatch.setattr(choice, "_of_gpu", lambda device: HOPPER._replace(**changes))

    put()
    return put


# ---- which operator


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "cudnn"),
        ({"capability": (10, 0)}, "cudnn"),
        ({"capability": (10, 3), "cuda": (12, 8)}, "cudnn"),
        ({"capability": (10, 7), "cuda": (12, 8)}, "flash"),
        ({"capability": (8, 0)}, "flash"),
        ({"capability": (8, 9)}, "flash"),
        ({"capability": (12, 0)}, "flash"),
        ({"capability": (7, 5)}, "reference"),  # no bf16
        ({"cudnn": 91500}, "flash"),  # wrong where keys are no multiple of 128
        ({"cudnn": 91501}, "cudnn"),
        ({"cudnn": 0}, "flash"),
        ({"torch": (2, 8)}, "flash"),
        ({"torch": (2, 9)}, "cudnn"),
        ({"cudnn_enabled": False}, "flash"),
        ({"deterministic": True}, "flash"),
        ({"deterministic": True, "flash_enabled": False}, "efficient"),
    ],
    ids=str,
)
def test_the_default_is_torchs_own_choice(changes: dict, chosen: str) -> None:
    """As `check_prefer_cudnn_attention` of torch has it, from 2.9 on."""
    assert operator("sdpa", CallShape(BF16, 128, 8192), HOPPER._replace(**changes)) == chosen


@pytest.mark.parametrize(
    ("shape", "sdpa_takes", "cudnn_takes", "flash_takes"),
    [
        (CallShape(BF16, 128, 8192, masked=True), "cudnn", "cudnn", "efficient"),
        (CallShape(F16, 64, 37), "cudnn", "cudnn", "flash"),
        (CallShape(BF16, 136, 8192), "flash", "flash", "flash"),
        (CallShape(BF16, 256, 8192), "flash", "flash", "flash"),
        (CallShape(BF16, 264, 8192), "efficient", "efficient", "efficient"),
        (CallShape(BF16, 256, 8192, masked=True), "efficient", "efficient", "efficient"),
        (CallShape(BF16, 64, 1), "flash", "flash", "flash"),
        (CallShape(BF16, 64, 8192, many=65536), "flash", "flash", "flash"),
        (CallShape(F32, 64, 8192), "efficient", "efficient", "efficient"),
        (CallShape(F64, 64, 8192), "reference", "reference", "reference"),
    ],
    ids=str,
)
def test_what_each_operator_takes(shape: CallShape, sdpa_takes: str, cudnn_takes: str, flash_takes: str) -> None:
    found = [operator(kernel, shape, HOPPER) for kernel in ("sdpa", "cudnn", "flash", "efficient")]
    assert found == [sdpa_takes, cudnn_takes, flash_takes, "reference" if shape.dtype == F64 else "efficient"]


def test_flash_of_consumer_gpus_has_no_backward_for_some_sizes() -> None:
    for capability in ((8, 6), (8, 9), (12, 0)):
        found = [
            operator("sdpa", CallShape(F16, width, 99), HOPPER._replace(capability=capability)) for width in (192, 200, 232)
        ]
        assert found == ["flash", "efficient", "flash"]


@pytest.mark.parametrize("value_dim", [8, 254, 255, 256, 257, 300])
@pytest.mark.parametrize("head_dim", [120, 126, 127, 128, 200, 247, 254, 255, 256, 257])
@pytest.mark.parametrize("bias", [False, True])
def test_no_operator_gets_a_wider_call_than_it_takes(head_dim: int, value_dim: int, bias: bool, monkeypatch, on_hopper) -> None:
    """The width is that of the call: with the channels of the bias, v if it is wider, and padding. By the calls themselves."""
    widths: dict[str, int] = {}

    def spy(name: str, fused: aten.Fused) -> aten.Fused:
        def forward(call: aten.Call):
            widths[name] = call.q.shape[-1] + -call.q.shape[-1] % 8
            return fused.forward(call)

        return aten.Fused(forward, fused.backward)

    monkeypatch.setattr(sdpa, "FUSED", {name: spy(name, fused) for name, fused in aten.FUSED.items()})
    for deterministic in (False, True):
        monkeypatch.setattr(choice, "strictly_deterministic", lambda deterministic=deterministic: deterministic)
        widths.clear()
        with FakeTensorMode():
            q, k = (torch.empty(1, 2, 5, head_dim, dtype=BF16, device="cuda") for _ in range(2))
            v = torch.empty(1, 2, 5, value_dim, dtype=BF16, device="cuda")
            given = Operands(q, k, v, torch.empty(1, 2, 5, device="cuda") if bias else None)
            get("sdpa").forward(given, [Piece(0, 5, 0, 5, FULL)], Options(0.3))
        ((name, width),) = widths.items()
        assert width == call_width(head_dim, value_dim, bias=bias)
        assert width <= {"cudnn": 128, "flash": 256}.get(name, width)
        assert name == resolved("sdpa", CUDA, BF16, head_dim, value_dim, 2, bias=bias)
        for kernel, most in (("flash2", 256), ("flash", 256), ("cudnn", 128)):
            said = obstacle(kernel, CUDA, BF16, head_dim, value_dim, bias=bias, generation=9)
            assert ("takes head sizes up to" in (said or "")) is (width > most), said


def test_a_pinned_operator_that_cannot_compute_a_call_is_refused(on_hopper, monkeypatch) -> None:
    assert obstacle("cudnn", CUDA, BF16, 128) is None and obstacle("flash", CUDA, BF16, 256) is None
    assert obstacle("efficient", CUDA, F32, 300, bias=True) is None
    assert "efficient' takes bfloat16, float16 and float32, not float64; make" in str(obstacle("efficient", CUDA, F64, 64))
    assert "'flash' runs on CUDA and the tensors are on cpu" in str(obstacle("flash", torch.device("cpu"), BF16, 64))
    on_hopper(capability=(8, 9))
    assert "'flash' does not take head size 208 in bfloat16" in str(obstacle("flash", CUDA, BF16, 206, bias=True))
    on_hopper(cudnn=0)
    assert "'cudnn' does not take head size 64 in float16 with compute capability 9.0 and cuDNN 0" in str(
        obstacle("cudnn", CUDA, F16, 64)
    )
    on_hopper()
    monkeypatch.setattr(choice, "strictly_deterministic", lambda: True)
    assert "'cudnn' has no deterministic backward" in str(obstacle("cudnn", CUDA, BF16, 64))
    assert obstacle("sdpa", CUDA, BF16, 64) is None and resolved("sdpa", CUDA, BF16, 64, 64, 1) == "flash"


def test_resolved_names_what_computes(on_hopper) -> None:
    def name(kernel: str, device: torch.device = CUDA, dtype: torch.dtype = BF16, **more: bool) -> str:
        return resolved(kernel, device, dtype, 128, 128, 32, **more)

    assert name("sdpa") == "cudnn" and name("sdpa", bias=True) == "flash" and name("sdpa", dtype=F64) == "reference"
    assert name("sdpa", bias=True, bands=True) == "efficient" and name("sdpa", softcap=True) == "reference"
    assert name("sdpa", torch.device("cpu")) == "cpu" and name("sdpa", torch.device("meta")) == "reference"
    assert name("flash") == "flash" and name("efficient") == "efficient" and name("reference") == "reference"
    assert name("flash3:sm_margin=8") == "flash3:sm_margin=8"
    assert name("flash2", softcap=True) == "flash2" and name("flash2", softcap=True, bias=True) == "reference"
    on_hopper(capability=(8, 0))
    assert name("sdpa") == "flash"


def test_versions_are_read() -> None:
    assert version("2.11.0+cu130") == (2, 11) and version("2.9.0a0+git1") == (2, 9) and version("13") == (13, 0)


# ---- arguments and shapes


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("bias_heads", [None, 3])
@pytest.mark.parametrize("kernel", ["sdpa", "cudnn", "flash", "efficient"])
def test_cuda_operators_take_these_arguments(kernel: str, dtype: torch.dtype, band: Band, bias_heads, on_hopper) -> None:
    """Names, order, shapes and dtypes only: fake tensors compute nothing."""
    if kernel == "sdpa":
        on_hopper(capability=(8, 0))
    with FakeTensorMode():
        q = torch.empty(2, 9, 37, 20, dtype=dtype, device="cuda")
        k = torch.empty(2, 3, 37, 20, dtype=dtype, device="cuda")
        bias = None if bias_heads is None else torch.empty(2, bias_heads, 37, device="cuda")
        rows = torch.empty(2, 9, 37, device="cuda")
        piece = [Piece(0, 37, 0, 37, band)]
        out, lse = get(kernel).forward(Operands(q, k, k, bias), piece, Options(0.3))
        grads = get(kernel).backward(Operands(q, k, k, bias), Rows(out.to(dtype), rows, rows), piece, Options(0.3))
        assert (out.shape, out.device, lse.shape, lse.dtype) == (q.shape, q.device, (2, 9, 37), torch.float32)
        assert [g.shape for g in grads[:3]] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("name", ["efficient", "cudnn"])
@pytest.mark.parametrize("keys", [37, 48])
def test_a_mask_has_the_memory_of_one_head(name: str, keys: int, on_hopper) -> None:
    with FakeTensorMode():
        q, k = (torch.empty(3, heads, keys, 16, dtype=BF16, device="cuda") for heads in (8, 4))
        mask = sdpa.additive_mask(keys, keys, Band(-3, 2), BF16, q.device)
        assert sdpa.additive_mask(keys, keys, Band(-3, 2), BF16, q.device) is mask
        for given in (mask, torch.empty(keys, keys, dtype=BF16, device="cuda")):
            call = aten.Call(q, k, k, given, False, 0.3)
            passed = (aten._shared if name == "cudnn" else aten._repeated)(call)[3]
            assert passed.shape == (3, 8 if name == "efficient" else 1, keys, keys)
            assert (
                passed.stride(0) == 0
                and (passed.shape[1] == 1 or passed.stride(1) == 0)
                and passed.stride(-1) == 1
                and passed.stride(-2) % 16 == 0
            )
            assert passed.untyped_storage().nbytes() <= keys * (keys + 15) * 2


# ---- arithmetic around the operators, behind functions with their signatures


def _flash(q, k, v, dropout_p, is_causal, return_debug_mask, *, scale):
    assert dropout_p == 0.0 and return_debug_mask is False and q.shape[-1] % 8 == 0 and q.shape[1] == 3 * k.shape[1]
    out, lse = aten.cpu_forward(aten.Call(q, k, v, None, is_causal, scale))
    return out, lse, None, None, q.shape[2], k.shape[2], None, None, None


def _flash_backward(
    grad_out, q, k, v, out, logsumexp, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset, *, scale
):
    assert (cum_q, cum_k, max_q, max_k, dropout_p) == (None, None, q.shape[2], k.shape[2], 0.0)
    assert logsumexp.is_contiguous()
    return aten.cpu_backward(aten.Call(q, k, v, None, is_causal, scale), grad_out, out, logsumexp)


def _efficient(q, k, v, attn_bias, compute_log_sumexp, dropout_p, is_causal, *, scale):
    assert compute_log_sumexp is True and dropout_p == 0.0 and q.shape[1] == k.shape[1] == v.shape[1] and q.shape[-1] % 8 == 0
    out, lse = aten.cpu_forward(aten.Call(q, k, v, attn_bias, is_causal, scale))
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32)), None, None


def _efficient_backward(
    grad_out, q, k, v, attn_bias, out, logsumexp, seed, offset, dropout_p, grad_input_mask, is_causal, *, scale
):
    assert logsumexp.shape[-1] % 32 == 0 and grad_input_mask == [True, True, True, False]
    call = aten.Call(q, k, v, attn_bias, is_causal, scale)
    return (*aten.cpu_backward(call, grad_out, out, logsumexp[..., : q.shape[2]]), None)


class _Cudnn:
    """cuDNN's operator of some torch: lse of 3 or 4 dimensions; plans for backward are kept by the strides of q, k and v."""

    def __init__(self, dims: int, shares_heads: bool) -> None:
        self.dims, self.shares_heads, self.plans = dims, shares_heads, {}

    def forward(self, q, k, v, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, *, scale):
        assert return_debug_mask is False and compute_log_sumexp is True and q.shape[-1] % 8 == 0 and dropout_p == 0.0
        assert q.shape[1] == (3 if self.shares_heads else 1) * k.shape[1] or q.shape == k.shape == (1, 1, 64, 64)
        out, lse = aten.cpu_forward(aten.Call(q, k, v, attn_bias, is_causal, scale))
        lse = lse.contiguous()
        return out, lse.unsqueeze(-1) if self.dims == 4 else lse, None, None, q.shape[2], k.shape[2], None, None, None

    def backward(
        self, grad_out, q, k, v, out, lse, philox_seed, philox_offset, attn_bias, cum_q, cum_k, max_q, max_k, dropout_p,
        is_causal, *, scale,
    ):  # fmt: skip
        assert (cum_q, cum_k, max_q, max_k, dropout_p) == (None, None, q.shape[2], k.shape[2], 0.0)
        assert lse.is_contiguous() and lse.shape == (*q.shape[:3], 1)[: self.dims]
        key = (*((x.shape, x.stride()) for x in (q, k, v)), is_causal, attn_bias is None)
        assert self.plans.setdefault(key, (out.stride(), grad_out.stride())) == (out.stride(), grad_out.stride())
        return aten.cpu_backward(aten.Call(q, k, v, attn_bias, is_causal, scale), grad_out, out, lse.reshape(q.shape[:3]))


@pytest.fixture
def on_stand_ins(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def install(name: str, *, dims: int = 4, shares_heads: bool = True) -> None:
        cudnn, real = _Cudnn(dims, shares_heads), torch.ops.aten
        operators = SimpleNamespace(
            _scaled_dot_product_flash_attention=_flash,
            _scaled_dot_product_flash_attention_backward=_flash_backward,
            _scaled_dot_product_efficient_attention=_efficient,
            _scaled_dot_product_efficient_attention_backward=_efficient_backward,
            _scaled_dot_product_cudnn_attention=cudnn.forward,
            _scaled_dot_product_cudnn_attention_backward=cudnn.backward,
            _scaled_dot_product_flash_attention_for_cpu=real._scaled_dot_product_flash_attention_for_cpu,
            _scaled_dot_product_flash_attention_for_cpu_backward=real._scaled_dot_product_flash_attention_for_cpu_backward,
        )
        monkeypatch.setattr(aten, "aten", operators)
        monkeypatch.setattr(aten, "CUDNN_SHARES_HEADS", shares_heads)
        monkeypatch.setattr(sdpa, "chosen", lambda kernel, device, shape: name)

    return install


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
@pytest.mark.parametrize("bias_heads", [None, 1, 3])
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_arithmetic_around_the_cuda_operators(name: str, bias_heads, band: Band, on_stand_ins) -> None:
    """Padding, KV heads shared or repeated, bias channels."""
    if name == "flash" and band not in (FULL, CAUSAL):
        pytest.skip("flash is not chosen for bands")
    on_stand_ins(name)
    inputs = block(bias_heads=bias_heads, value_dim=12)
    for pieces in ([Piece(0, 37, 0, 37, band)], [Piece(a, b, a, b, band) for a, b in ((0, 11), (11, 37))]):
        assert_same(both_passes("sdpa", inputs, pieces), both_passes("reference", inputs, pieces))


@pytest.mark.parametrize("dims", [3, 4])
@pytest.mark.parametrize("shares_heads", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 37])
def test_cudnn_of_every_torch(dims: int, shares_heads: bool, rows: int, on_stand_ins) -> None:
    """lse with and without a last dimension of 1, also of one row; fewer KV heads as they are or repeated."""
    on_stand_ins("cudnn", dims=dims, shares_heads=shares_heads)
    q, k, v, bias = block(bias_heads=3)
    inputs, pieces = (q[:, :, :rows], k, v, bias), [Piece(0, rows, 0, 37, FULL)]
    assert_same(both_passes("sdpa", inputs, pieces), both_passes("reference", inputs, pieces))


def test_cudnns_kept_plans_see_one_memory_order(on_stand_ins) -> None:
    """dout arrives as views of messages, of (batch, rows, heads, dim), of slices: the plan was made for one of them."""
    on_stand_ins("cudnn")
    q, k, v, _ = block()
    given, pieces, options = Operands(q, k, v, None), [Piece(0, 37, 0, 37, CAUSAL)], Options(0.3)
    whole = get("reference").forward(given, pieces, options)
    dout = torch.randn(whole.out.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    for order in (dout, dout.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([dout, dout], 1)[:, :9]):
        rows = Rows(order, whole.lse, (order * whole.out).sum(-1))
        expected = get("reference").backward(given, rows, pieces, options)
        assert_same(get("sdpa").backward(given, rows, pieces, options)[:3], expected[:3])
