"""`attention` as an ordinary function: how it behaves in training code, and which errors it raises for wrong input."""

import pytest
import torch
import torch.distributed as dist
from meaning import dense
from spawn import finish, run_ranks, start
from torch.utils.checkpoint import checkpoint

import ringattn
from ringattn import InputError, LaunchError, MismatchError, Plan, RingAttnError, attention, causal, make_plan, shard, unshard
from ringattn.comm import consistency as agree
from ringattn.comm.gloo_duplex import Transfer
from ringattn.comm.p2p import P2P
from ringattn.execution import arguments
from ringattn.execution.autograd import Inputs, attend
from ringattn.kernels import Options
from ringattn.nn import cross_entropy


def plan_for(world: int, **changes) -> Plan:
    kwargs = dict(world=world, heads=4, kv_heads=2, head_dim=8, dtype="float64", mask=causal(), schedule="token_ring") | changes
    return make_plan(changes.pop("length", 13), **{k: v for k, v in kwargs.items() if k != "length"})


def tensors(plan: Plan, rank: int = 0, **changes) -> list[torch.Tensor]:
    torch.manual_seed(0)
    heads = (plan.heads, plan.kv_heads, plan.kv_heads)
    full = [torch.randn(2, plan.seq_len, h, plan.head_dim, dtype=changes.get("dtype", torch.float64)) for h in heads]
    return [shard(x, plan, rank=rank).requires_grad_() for x in full]


# ---- one process


def test_a_world_of_one_needs_no_process_group() -> None:
    plan = plan_for(1)
    q, k, v = tensors(plan)
    out, lse = attention(q, k, v, plan, return_lse=True)
    expected, expected_lse = dense(q, k, v, causal())
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert out.is_contiguous() and not lse.requires_grad
    assert torch.autograd.gradcheck(lambda *x: attention(*x, plan), (q, k, v))


def test_gradients_of_bias_and_sinks() -> None:
    plan = plan_for(1)
    q, k, v = tensors(plan)
    bias = torch.randn(2, 13, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b, s: attention(q, k, v, plan, key_bias=b, sinks=s), (bias, sinks))


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    plan = plan_for(1)
    q, k, v = tensors(plan)
    bias = torch.zeros(2, 13, dtype=torch.float64)
    bias[:, 0] = -torch.inf  # under causal the first row then has no key
    sinks = torch.full((4,), -torch.inf, dtype=torch.float64, requires_grad=True)
    out = attention(q, k, v, plan, key_bias=bias, sinks=sinks)
    assert torch.equal(out, attention(q, k, v, plan, key_bias=bias)) and (out[:, 0] == 0).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v, sinks)))


def test_no_grad_keeps_no_graph() -> None:
    plan = plan_for(1)
    with torch.no_grad():
        assert attention(*tensors(plan), plan).grad_fn is None


@pytest.mark.case(12)
def test_strided_and_expanded_inputs_give_the_same_bits() -> None:
    plan = plan_for(1)
    q, k, v = (x.detach() for x in tensors(plan))
    swapped = q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = k[:1].expand(2, -1, -1, -1)
    assert torch.equal(attention(swapped, wide, v, plan), attention(q, wide.contiguous(), v, plan))


def test_autocast_casts_as_sdpa_does() -> None:
    plan = plan_for(1, dtype="bfloat16")
    q, k, v = (x.detach().float().requires_grad_() for x in tensors(plan))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, plan)
        assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match=r"bfloat16.*plan is for float64"):
        attention(q, k, v, plan_for(1))


def test_differentiating_twice_raises() -> None:
    plan = plan_for(1)
    q, k, v = tensors(plan)
    (grad,) = torch.autograd.grad(attention(q, k, v, plan).square().sum(), q, create_graph=True)
    with pytest.raises(InputError, match="a second derivative of attention"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda q, k, v: (q[:, :-1], k, v, {}), r"q has shape \(2, 12, 4, 8\), the plan expects \(2, 13, 4, 8\)"),
        (lambda q, k, v: (q.transpose(1, 2), k, v, {}), "heads and rows are swapped"),
        (lambda q, k, v: (q, k[:, :, :1], v, {}), "k has shape .* make the plan with the model's heads"),
        (lambda q, k, v: (q, k, v[:1], {}), "v has shape"),
        (lambda q, k, v: (q, k.float(), v, {}), "k has dtype torch.float32 and the plan is for float64; cast k"),
        (lambda q, k, v: (q[0], k, v, {}), "q has shape"),
        (lambda q, k, v: (torch.zeros(()), k, v, {}), "q has shape"),
        (lambda q, k, v: (q, k.to("meta"), v, {}), "k is on meta and q on cpu"),
        (lambda q, k, v: (q, k, v, dict(sinks=torch.zeros(3))), r"sinks has shape \(3,\), the plan expects \(4,\)"),
        (lambda q, k, v: (q, k, v, dict(key_bias=torch.zeros(2, 12))), "key_bias has shape"),
        (lambda q, k, v: (q, k, v, dict(key_bias=torch.zeros(2, 13, dtype=torch.long))), "floating-point"),
        (lambda q, k, v: (q, k, v, dict(scale=0.0)), "scale=0.0: must be finite"),
        (lambda q, k, v: (q, k, v, dict(scale=float("nan"))), "scale=nan"),
        (lambda q, k, v: (q, k, v, dict(softcap=-1.0)), "softcap=-1.0"),
    ],
)
def test_input_that_does_not_fit_is_named(change, text: str) -> None:
    plan = plan_for(1)
    q, k, v, options = change(*tensors(plan))
    with pytest.raises(InputError, match=text):
        attention(q, k, v, plan, **options)


def test_the_whole_sequence_instead_of_a_shard() -> None:
    plan = plan_for(1)
    with pytest.raises(InputError, match="13 positions"):
        shard(torch.zeros(1, 12, 3), plan)
    with pytest.raises(InputError, match="rank=5"):
        shard(torch.zeros(1, 13, 3), plan, rank=5)


def test_a_plan_for_many_needs_a_group() -> None:
    with pytest.raises(LaunchError, match="torchrun --nproc-per-node"):
        attention(*tensors(plan_for(2)), plan_for(2))


def test_init_without_torchrun_names_the_command_to_use() -> None:
    _, _, err = finish(start(["-c", "import ringattn; ringattn.init()"]), timeout=120)
    assert "LaunchError: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_PORT, MASTER_ADDR not set" in err
    assert "torchrun --nproc-per-node" in err


# ---- several processes; each function below runs on every rank


def training_forms(rank: int) -> None:
    """Checkpointing, double use in one graph and no_grad change nothing."""
    plan = plan_for(3)
    q, k, v = tensors(plan, rank)

    def twice(q: torch.Tensor) -> torch.Tensor:
        return attention(attention(q, k, v, plan), k, v, plan)

    plain = torch.autograd.grad(twice(q).sum(), (q, k, v))
    recomputed = torch.autograd.grad(checkpoint(twice, q, use_reentrant=False).sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    full = [unshard(x.detach(), plan).requires_grad_() for x in (q, k, v)]
    first_layer, _ = dense(*full, causal())
    expected = torch.autograd.grad(dense(first_layer, *full[1:], causal())[0].sum(), full)
    for a, b in zip(plain, expected, strict=True):
        torch.testing.assert_close(a, shard(b, plan))
    with torch.no_grad():
        assert torch.equal(twice(q), twice(q))


def test_checkpointing_and_double_use() -> None:
    run_ranks(3, training_forms)


def sub_groups(rank: int) -> None:
    """Two sequences on two groups of two ranks: peers are group ranks, not global ones."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    plan = plan_for(mesh["sequence"])
    torch.manual_seed(mesh.get_local_rank("data"))
    full = [torch.randn(1, 13, h, 8, dtype=torch.float64) for h in (4, 2, 2)]
    own = [shard(x, plan, rank=mesh.get_local_rank("sequence")) for x in full]
    for group in (mesh["sequence"], mesh["sequence"].get_group()):
        out = unshard(attention(*own, plan, group=group), plan, group=group)
        torch.testing.assert_close(out, dense(*full, causal())[0])


def test_attention_on_sub_groups() -> None:
    run_ranks(4, sub_groups)


def caught(rank: int, *args) -> str:
    """The error of the call, as text."""
    if args[1]:  # not the first call: the ranks have agreed before, on this kind of call too
        plan = plan_for(3)
        attention(*tensors(plan, rank), plan)
        attention(*tensors(plan, rank), plan, scale=0.5)
    try:
        MISTAKES[args[0]](rank)
    except RingAttnError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _wrong_rows(rank: int) -> None:
    q, k, v = tensors(plan_for(3), rank)
    attention(q[:, :-1] if rank == 1 else q, k, v, plan_for(3))


def _anothers_rows(rank: int) -> None:
    """14 tokens over 3 ranks contiguously: 5, 5 and 4 rows; ranks take their neighbour's."""
    plan = plan_for(3, length=14, layout="contiguous")
    attention(*tensors(plan, (rank + 1) % 3), plan)


def _different_plans(rank: int) -> None:
    plan = plan_for(3, schedule="ring" if rank == 2 else "token_ring")
    attention(*tensors(plan, rank), plan)


def _different_heads(rank: int) -> None:
    plan = plan_for(3, heads=4 if rank == 0 else 8)
    attention(*tensors(plan, rank), plan)


def _different_dtypes(rank: int) -> None:
    """As many bytes, so gloo would turn the bits of one into the other."""
    plan = plan_for(3, dtype="bfloat16")
    q, k, v = tensors(plan, rank, dtype=torch.bfloat16)
    attention(*(x.half() if rank == 2 else x for x in (q, k, v)), plan)


def _plans_of_different_dtypes(rank: int) -> None:
    dtype = "bfloat16" if rank == 0 else "float16"
    plan = plan_for(3, dtype=dtype)
    attention(*tensors(plan, rank, dtype=getattr(torch, dtype)), plan)


def _different_options(rank: int) -> None:
    attention(*tensors(plan_for(3), rank), plan_for(3), scale=0.5 if rank == 0 else None)


def _different_batch(rank: int) -> None:
    q, k, v = tensors(plan_for(3), rank)
    cut = slice(0, 1 if rank == 0 else 2)
    attention(q[cut], k[cut], v[cut], plan_for(3))


def _different_masks(rank: int) -> None:
    plan = plan_for(3, mask=ringattn.sliding_window(5 + (rank == 1)))
    attention(*tensors(plan, rank), plan)


def _different_grad_mode(rank: int) -> None:
    with torch.set_grad_enabled(rank != 2):
        attention(*tensors(plan_for(3), rank), plan_for(3))


def _wrong_device(rank: int) -> None:
    q, k, v = tensors(plan_for(3), rank)
    attention(q.to("meta") if rank == 0 else q, k, v, plan_for(3))


def _skipped_call(rank: int) -> None:
    if rank != 1:
        attention(*tensors(plan_for(3), rank), plan_for(3))
    unshard(tensors(plan_for(3), rank)[0], plan_for(3))


def _layers_in_another_order(rank: int) -> None:
    for layer in (4, 3) if rank == 1 else (3, 4):
        attention(*tensors(plan_for(3), rank), plan_for(3), strict=f"layer {layer}")


def _unshard_of_different_batch(rank: int) -> None:
    plan = plan_for(3)
    unshard(torch.zeros(1 + (rank == 0), plan.rows(rank), 2), plan)


def _unshard_along_no_dim(rank: int) -> None:
    plan = plan_for(3)
    unshard(torch.zeros(1, plan.rows(rank), 2), plan, dim=7 if rank == 2 else 1)


def _loss_of_wrong_targets(rank: int) -> None:
    cross_entropy(torch.zeros(1, 4, 7), torch.zeros(1, 4 - (rank == 1), dtype=torch.int64))


def _not_a_number(rank: int) -> None:
    q, k, v = tensors(plan_for(3), rank)
    if rank == 2:
        v = v.clone()
        v[0, 1, 0, 3], v[1, 0, 0, 0] = float("nan"), float("inf")
    attention(q, k, v, plan_for(3), check_finite="layer 3")


def _wrong_group(rank: int) -> None:
    attention(*tensors(plan_for(2), 0), plan_for(2))


MISTAKES = {name: f for name, f in globals().items() if name.startswith("_") and callable(f)}


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        pytest.param(mistake, text, id=mistake.__name__, marks=[pytest.mark.case(case)] if case else [])
        for case, mistake, text in (
            (8, _wrong_rows, "InputError: on rank 1: q has shape"),
            (8, _anothers_rows, "InputError: on rank 1: q has shape (2, 4, 4, 8), the plan expects (2, 5, 4, 8)"),
            (10, _different_plans, "MismatchError: ranks disagree on schedule: forward (token_ring"),
            (10, _different_heads, "MismatchError: ranks disagree on heads: 4 on rank 0, 8 on ranks 1, 2 (and on plan)"),
            (9, _different_dtypes, "InputError: on rank 2: q has dtype torch.float16 and the plan is for bfloat16; cast q"),
            (
                10,
                _plans_of_different_dtypes,
                "MismatchError: ranks disagree on dtype: torch.bfloat16 on rank 0, torch.float16 on",
            ),
            (10, _different_options, "MismatchError: ranks disagree on scale: 0.5 on rank 0, None on ranks 1, 2"),
            (0, _different_batch, "MismatchError: ranks disagree on batch: 1 on rank 0, 2 on ranks 1, 2"),
            (10, _different_masks, "MismatchError: ranks disagree on mask: window(5,0) on ranks 0, 2, window(6,0) on rank 1"),
            (
                0,
                _different_grad_mode,
                "MismatchError: ranks disagree on needs gradient: True on ranks 0, 1, and on rank 2 gradients",
            ),
            (0, _wrong_device, "InputError: on rank 0: q is on meta and the gloo group moves tensors on cpu"),
            (
                11,
                _skipped_call,
                "MismatchError: ranks disagree on call: attention on ranks 0, 2, unshard on rank 1. All ranks must",
            ),
            (
                11,
                _layers_in_another_order,
                "MismatchError: ranks disagree on strict: layer 3 on ranks 0, 2, layer 4 on rank 1. All",
            ),
            (8, _unshard_of_different_batch, "MismatchError: ranks disagree on shape beside the rows: [2, 2] on rank 0"),
            (0, _unshard_along_no_dim, "InputError: on rank 2: unshard(x): x of shape (1, 4, 2) does not have the 4 rows"),
            (0, _loss_of_wrong_targets, "InputError: on rank 1: targets has shape (1, 3)"),
            (15, _not_a_number, "InputError: on rank 2: layer 3: v holds 1 NaN and 1 infinities, the first at (0, 1, 0, 3)"),
            (0, _wrong_group, "MismatchError: the plan is for 2 ranks and the group has 3"),
        )
    ],
)
@pytest.mark.parametrize("later", [False, True], ids=["first call", "later call"])
def test_every_rank_raises_for_one_ranks_mistake(mistake, text: str, later: bool) -> None:
    errors = run_ranks(3, caught, mistake.__name__, later, timeout=30)
    assert len(set(errors)) == 1 and errors[0].startswith(text), errors


def agreeing_once(rank: int) -> tuple[int, int, str]:
    """Agreements of twenty calls of one kind, without and with `strict`; and the error when a new kind differs."""
    plan, exchanges = plan_for(2), []
    original = agree._exchange
    agree._exchange = lambda *kwargs: (exchanges.append(1), original(*kwargs))[1]
    counts = []
    for strict in (False, True):
        exchanges.clear()
        for _ in range(20):
            attention(*tensors(plan, rank), plan, strict=strict)
        counts.append(len(exchanges))
    try:
        attention(*tensors(plan, rank), plan, strict=False, scale=1.0 + rank)
    except MismatchError as error:
        return (*counts, str(error))
    finally:
        agree._exchange = original
    return (*counts, "no error")


def test_ranks_can_agree_once_for_each_kind_of_call() -> None:
    for first, every, error in run_ranks(2, agreeing_once):
        assert (first, every) == (1, 20) and error.startswith("ranks disagree on scale: 1.0 on rank 0, 2.0 on rank 1")


def rank_1_leaves(rank: int) -> str:
    """Rank 1 leaves after all have agreed, while its peers transfer."""
    plan = plan_for(3)
    attention(*tensors(plan, rank), plan)
    if rank == 1:
        return "left"
    try:
        for _ in range(3):
            attend([Inputs(*tensors(plan, rank))], plan, Options(0.3), P2P(dist.group.WORLD))
    except ringattn.CommError as error:
        return str(error)
    return "no error"


def test_a_rank_that_leaves_is_named_by_its_peers() -> None:
    errors = run_ranks(3, rank_1_leaves, timeout=30)
    assert any(f"rank {rank}, forward" in errors[rank] and "rank 1" in errors[rank] for rank in (0, 2)), errors
    assert all("departing in step" in errors[rank] for rank in (0, 2)), errors


def bytes_of_agreement(rank: int) -> list[int]:
    """Bytes that this rank sends in each exchange, over four calls of two kinds."""
    sent = []
    original = agree.finish

    def counting(transfers: list[Transfer]) -> None:
        sent.extend(transfer.tensor.nbytes for transfer in transfers if transfer.src == rank)
        original(transfers)

    agree.finish = counting
    try:
        plan = plan_for(dist.get_world_size())
        for scale in (None, None, 0.3, None):
            attention(*tensors(plan, rank), plan, scale=scale)
    finally:
        agree.finish = original
    return sent


@pytest.mark.parametrize(("world", "numbers"), [(2, [1]), (3, [1, 1]), (4, [1, 2])])
def test_agreement_costs_a_few_numbers_a_call(world: int, numbers: list[int]) -> None:
    """Each of them eight bytes: every rank receives those of all others in log2(world) messages."""
    assert run_ranks(world, bytes_of_agreement) == [[8 * n for n in numbers] * 4] * world


def bias_and_sinks(rank: int) -> None:
    """Through the public function, on several ranks, in both shapes of a bias."""
    plan = plan_for(3, schedule="bidirectional_ring")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 13, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for shape in ((2, 13), (2, 2, 13)):
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        own = shard(bias, plan, dim=-1)
        out = attention(*(shard(x, plan) for x in (q, k, v)), plan, key_bias=own, sinks=sinks)
        expected, _ = dense(q, k, v, causal(), key_bias=bias, sinks=sinks)
        torch.testing.assert_close(unshard(out.detach(), plan), expected.detach())
        leaves = (q, k, v, bias, sinks)
        actual = torch.autograd.grad(out.sum(), leaves)
        for a, b in zip(actual, torch.autograd.grad(expected.sum(), leaves), strict=True):
            dist.all_reduce(a)
            torch.testing.assert_close(a, b)


def test_bias_and_sinks_on_several_ranks() -> None:
    run_ranks(3, bias_and_sinks)


def test_errors_share_a_base() -> None:
    for name in ringattn.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(ringattn, name), RingAttnError)


def other_gpu(rank: int) -> str:
    """As if the GPU of rank 1 were of another generation, for which torch takes another operator."""
    arguments.resolved = lambda *_, **__: "flash" if rank else "cudnn"
    x = torch.zeros(1, 4, 2, 8)
    try:
        attention(x, x, x, make_plan(8, world=2, heads=2, head_dim=8))
    except MismatchError as error:
        return str(error)
    return ""


def test_ranks_whose_gpus_take_different_operators_raise() -> None:
    for error in run_ranks(2, other_gpu):
        assert "operator of kernel 'sdpa'" in error and "cudnn on rank 0, flash on rank 1" in error
        assert "give make_plan a kernel by name" in error
