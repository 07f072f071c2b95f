"""The native sampler against a plain float64 reading of its contract (backends.base.SamplingBatch); its statistics."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from octavo.backends.base import SamplingBatch, StepResult
from octavo.backends.torch import sampling
from step_batches import sampling_batch

native = pytest.importorskip("octavo.backends.cpu._native", reason="the cpu backend's extension is not built")
ISAS = native.available_isas()
FIELDS_OF_ROWS = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions", "num_logprobs")


def run(logits: np.ndarray, batch: SamplingBatch, isa: str = ISAS[0]) -> StepResult:
    rows = len(logits)
    columns = max(0, int(batch.num_logprobs.max()))
    result = StepResult(
        tokens=np.full(rows, -7, np.int32),
        logprobs=np.zeros(rows, np.float32),
        ranks=np.full(rows, -7, np.int32),
        top_tokens=np.full((rows, columns), -7, np.int32),
        top_logprobs=np.zeros((rows, columns), np.float32),
    )
    native.sample(
        isa,
        np.array(logits, np.float32),
        batch,
        result.tokens,
        result.logprobs,
        result.ranks,
        result.top_tokens,
        result.top_logprobs,
    )
    return result


def sample(logits: np.ndarray, isa: str = ISAS[0], **fields: object) -> StepResult:
    """Sample the rows of `logits`; a scalar field holds for every row."""
    rows = len(logits)
    defaults = sampling_batch(rows)
    arrays = {
        name: np.broadcast_to(np.asarray(value, getattr(defaults, name).dtype), (rows,)).copy()
        if name in FIELDS_OF_ROWS or name in ("repetition", "presence", "frequency")
        else np.asarray(value, getattr(defaults, name).dtype)
        for name, value in fields.items()
    }
    return run(logits, sampling_batch(rows, **arrays), isa)


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (rows, vocab)).astype(np.float32)


def philox(counter: int, key: int) -> list[int]:
    """Philox4x32-10, written from the paper: two multipliers, two Weyl increments of the key, ten rounds."""
    c = [counter >> 32 * i & 0xFFFFFFFF for i in range(4)]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        (high0, low0), (high1, low1) = divmod(c[0] * 0xD2511F53, 1 << 32), divmod(c[2] * 0xCD9E8D57, 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def uniform(seed: int, position: int) -> float:
    words = philox(position, seed)
    return float((words[1] << 32 | words[0]) >> 11) / 2.0**53


def adjusted(logits: np.ndarray, batch: SamplingBatch, r: int) -> np.ndarray:
    """Bias, then vLLM's penalties, as loops over the vocabulary, in float32 as the sampler must do them."""
    x = logits[r].astype(np.float32)
    for i in range(batch.bias_start[r], batch.bias_start[r + 1]):
        x[batch.bias_tokens[i]] += batch.bias_values[i]
    history = batch.history[batch.history_start[r] : batch.history_start[r + 1]].tolist()
    output = history[len(history) - batch.history_outputs[r] :]
    for token in set(history):
        x[token] = x[token] / batch.repetition[r] if x[token] > 0 else x[token] * batch.repetition[r]
    for token in set(output):
        x[token] -= batch.frequency[r] * np.float32(output.count(token))
        x[token] -= batch.presence[r]
    return x


def probabilities(x: np.ndarray, batch: SamplingBatch, r: int) -> tuple[np.ndarray, float]:
    """What is left to draw from, float64, and how near to a cut of top_p or min_p the nearest token is."""
    p = np.exp((x.astype(np.float64) - x.max()) / batch.temperature[r])
    order = np.lexsort((np.arange(len(x)), -x))
    if batch.top_k[r] > 0:
        p[order[batch.top_k[r] :]] = 0
    p /= p.sum()
    margin = np.inf
    if batch.top_p[r] < 1:
        before = np.cumsum(p[order]) - p[order]
        margin = np.abs(before - batch.top_p[r]).min()
        p[order[before >= batch.top_p[r]]] = 0
    ratio = p / p.max()
    if 0 < batch.min_p[r] < 1:
        margin = min(margin, np.abs(ratio - batch.min_p[r]).min())
    p[ratio < batch.min_p[r]] = 0
    return p / p.sum(), margin


def test_philox_gives_the_published_vectors() -> None:
    """Random123's kat_vectors for philox4x32 with 10 rounds; the reference of this file too."""
    ones = 0xFFFFFFFF
    known = [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, [ones] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, expected in known:
        assert list(native.philox4x32(counter, key)) == expected
        assert philox(sum(c << 32 * i for i, c in enumerate(counter)), key[0] | key[1] << 32) == expected


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 2047, 2048, 2049, 49152])
def test_greedy_takes_the_largest_logit_and_of_equals_the_first(isa: str, vocab: int) -> None:
    logits = np.round(random_logits(20, vocab))  # many ties
    logits[1] = -np.inf
    logits[1, -1] = -1e30
    assert sample(logits, isa).tokens.tolist() == logits.argmax(1).tolist()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_parameters_match_the_reference(data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([1, 3, 40, 300, 3000]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = rng.normal(0, data.draw(st.sampled_from([0.1, 2, 8])), (1, vocab)).astype(np.float32)
    if data.draw(st.booleans()):
        logits = np.round(logits * 2) / 2
    history = rng.integers(0, vocab, data.draw(st.integers(0, 30))).astype(np.int32)
    bias = rng.integers(0, vocab, data.draw(st.integers(0, 5))).astype(np.int32)
    floats = {
        "temperature": data.draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
        "top_p": data.draw(st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-6])),
        "min_p": data.draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
        "repetition": data.draw(st.sampled_from([1.0, 1.3, 0.7])),
        "presence": data.draw(st.sampled_from([0.0, 1.5, -2.0])),
        "frequency": data.draw(st.sampled_from([0.0, 0.5, -0.5])),
    }
    batch = sampling_batch(
        1,
        **{name: np.array([value], np.float32) for name, value in floats.items()},
        top_k=np.array([data.draw(st.sampled_from([0, 1, 2, 20, 1000, 5000]))], np.int32),
        seeds=np.array([data.draw(st.integers(0, 2**64 - 1))], np.uint64),
        positions=np.array([data.draw(st.integers(0, 2**40))], np.int64),
        history=history,
        history_start=np.array([0, len(history)], np.int32),
        history_outputs=np.array([data.draw(st.integers(0, len(history)))], np.int32),
        bias_tokens=bias,
        bias_values=rng.choice(np.array([-np.inf, -3, 4.5], np.float32), len(bias)),
        bias_start=np.array([0, len(bias)], np.int32),
    )
    x = adjusted(logits, batch, 0)
    assume(x.max() > -np.inf)
    tokens = {isa: int(run(logits, batch, isa).tokens[0]) for isa in ISAS}
    if batch.temperature[0] == 0:
        assert set(tokens.values()) == {int(x.argmax())}
        return
    p, margin = probabilities(x, batch, 0)
    assume(margin > 1e-5)
    u, end = uniform(int(batch.seeds[0]), int(batch.positions[0])), np.cumsum(p)
    for token in tokens.values():
        assert p[token] > 0
        assert end[token] - p[token] - 1e-5 <= u <= end[token] + 1e-5


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.5, "top_k": 8},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.1},
        {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("varied", ["positions", "seeds"])
def test_draws_are_distributed_as_the_parameters_say(fields: dict[str, float], varied: str) -> None:
    """Chi-square at 1 in 10,000, over the positions of one seed and over the seeds of one position; both are fixed."""
    draws, vocab = 20_000, 50
    logits = random_logits(1, vocab, seed=3, scale=1)
    batch = sampling_batch(1, **{k: np.array([v], np.int32 if k == "top_k" else np.float32) for k, v in fields.items()})
    expected = probabilities(logits[0], batch, 0)[0] * draws
    tokens = sample(np.repeat(logits, draws, 0), **{"seeds": 11, **fields, varied: np.arange(draws)}).tokens
    found = np.bincount(tokens, minlength=vocab)
    assert found[expected == 0].sum() == 0
    likely = expected >= 5
    statistic = ((found - expected)[likely] ** 2 / expected[likely]).sum()
    degrees = likely.sum() - 1
    # Wilson and Hilferty: (chi2 / d)^(1/3) is close to normal.
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / np.sqrt(2 / (9 * degrees))
    assert abs(z) < 3.9


def test_a_tiny_top_p_or_top_k_1_or_min_p_1_is_greedy() -> None:
    logits = random_logits(50, 5000)
    logits[:, 1000] = logits.max(1)  # a tie: the lower token id
    greedy = logits.argmax(1).tolist()
    seeds = np.arange(50)
    assert sample(logits, temperature=5, top_p=1e-9, seeds=seeds).tokens.tolist() == greedy
    assert sample(logits, temperature=5, top_k=1, seeds=seeds).tokens.tolist() == greedy
    assert sample(logits, temperature=1e-30, seeds=seeds).tokens.tolist() == [
        row.argmax() if uniform(seed, 0) < 0.5 else len(row) - 1 - row[::-1].argmax() for seed, row in enumerate(logits)
    ]


def test_truncation_cuts_ties_at_the_lower_token_ids() -> None:
    """Of 10 equal logits, top_k 4 and top_p 0.35 keep the first 4, at exactly one half the first 5."""
    logits = np.full((400, 10), 2.0, np.float32)
    positions = np.arange(400)
    for fields, kept in [({"top_k": 4}, 4), ({"top_p": 0.35}, 4), ({"top_p": 0.5}, 5), ({"top_k": 4, "top_p": 0.5}, 2)]:
        tokens = sample(logits, temperature=1, positions=positions, **fields).tokens
        assert set(tokens.tolist()) == set(range(kept))
    logits[:, 9] = 3
    for fields in ({"top_k": 4}, {"top_p": 0.35}):  # 9 weighs e of 9 + e: 0.23, then 0.085 each
        tokens = sample(logits, temperature=1, positions=positions, **fields).tokens
        assert set(tokens.tolist()) == ({9, 0, 1, 2} if "top_k" in fields else {9, 0, 1})


def test_top_p_counts_what_top_k_left_and_min_p_comes_last() -> None:
    """Weights 8 4 2 1 1: top_k 3 leaves 8 4 2 of 14, of which top_p 0.8 wants 8 and 4; alone it wants 2 as well."""
    logits = np.log2(np.array([[8, 4, 2, 1, 1]], np.float64)).astype(np.float32).repeat(300, 0) * np.float32(np.log(2))
    positions = np.arange(300)

    def kept(**fields: float) -> set[int]:
        return set(sample(logits, temperature=1, positions=positions, **fields).tokens.tolist())

    assert kept(top_p=0.8) == {0, 1, 2}
    assert kept(top_p=0.8, top_k=3) == {0, 1}
    assert kept(min_p=0.24) == {0, 1, 2}
    assert kept(min_p=0.26) == {0, 1}
    assert kept(top_p=0.8, min_p=0.6) == {0}


def test_penalties_are_vllms() -> None:
    """Prompt 0 1, output 1 2 2; the effect on greedy logprob order is read off the bias that makes up for it."""
    logits = np.array([[2.0, 2.0, 2.0, 2.0, -1.0]], np.float32)
    history = {"history": [0, 1, 4, 1, 2, 2], "history_start": [0, 6], "history_outputs": [3]}

    def best(**fields: object) -> int:
        return int(sample(logits, **history, **fields).tokens[0])

    assert best(repetition=1.5) == 3
    assert best(repetition=0.5) == 0
    assert best(presence=1.0) == 0
    assert best(presence=-1.0) == 1
    assert best(frequency=-1.0) == 2
    assert best(frequency=1.0, bias_tokens=[1, 2], bias_values=[1.5, 1.9], bias_start=[0, 2]) == 1
    assert best(repetition=0.1, bias_tokens=[4], bias_values=[0.9], bias_start=[0, 1]) == 0  # -0.1 * 0.1 < 2 / 0.1


def test_a_banned_token_is_never_drawn() -> None:
    logits = random_logits(500, 64, scale=1)
    banned = np.arange(0, 64, 2)
    tokens = sample(
        logits,
        temperature=3,
        positions=np.arange(500),
        bias_tokens=np.tile(banned, 500),
        bias_values=np.full(32 * 500, -np.inf),
        bias_start=np.arange(501) * 32,
    ).tokens
    assert (tokens % 2 == 1).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fields", [{}, {"temperature": 1}, {"temperature": 1, "top_k": 5, "top_p": 0.9, "min_p": 0.1}])
def test_a_row_without_a_token_to_draw_gives_minus_one_and_leaves_its_neighbors_alone(isa: str, fields: dict) -> None:
    logits = random_logits(8, 3001)
    sound = sample(logits, isa, num_logprobs=2, **fields)
    logits[1, 17] = np.nan
    logits[2] = np.nan
    logits[3, 3000] = np.inf
    logits[4] = -np.inf
    logits[6, :] = -np.inf
    logits[6, 5] = 0.5
    batch = {
        "bias_tokens": np.arange(3001),
        "bias_values": np.full(3001, -np.inf),
        "bias_start": [0] + [0] * 5 + [3001] * 3,
    }
    damaged = sample(logits, isa, num_logprobs=2, **batch, **fields)
    assert damaged.tokens[1:6].tolist() == [-1] * 5  # row 5: every token is banned
    assert damaged.tokens[6] == 5
    assert np.isnan(damaged.logprobs[1:6]).all()
    assert damaged.ranks[1:6].tolist() == [0] * 5
    assert damaged.top_tokens[1:6].tolist() == [[-1, -1]] * 5
    for row in (0, 7):
        assert damaged.tokens[row] == sound.tokens[row]
        assert damaged.logprobs[row] == sound.logprobs[row]
        assert damaged.top_logprobs[row].tolist() == sound.top_logprobs[row].tolist()


@pytest.mark.parametrize("isa", ISAS)
def test_logprobs_are_of_the_raw_logits(isa: str) -> None:
    logits = np.round(random_logits(40, 5000, scale=4), 1)  # rounded: ties among the likeliest
    result = sample(
        logits,
        isa,
        temperature=2,
        seeds=np.arange(40),
        num_logprobs=20,
        repetition=1.5,
        history=np.tile(np.arange(100), 40),
        history_start=np.arange(41) * 100,
        history_outputs=np.full(40, 50),
        bias_tokens=np.tile([7, 7, 9], 40),
        bias_values=np.tile([5.0, 5.0, -np.inf], 40),
        bias_start=np.arange(41) * 3,
    )
    x = logits.astype(np.float64)
    logprobs = x - x.max(1, keepdims=True)
    logprobs -= np.log(np.exp(logprobs).sum(1, keepdims=True))
    order = np.argsort(-logits, axis=1, kind="stable")
    for row, token in enumerate(result.tokens):
        assert result.logprobs[row] == pytest.approx(logprobs[row, token], abs=1e-5)
        assert order[row, result.ranks[row] - 1] == token
        assert result.top_tokens[row].tolist() == order[row, :20].tolist()
        np.testing.assert_allclose(result.top_logprobs[row], logprobs[row, order[row, :20]], atol=1e-5)


def test_rows_that_want_fewer_logprobs_get_fewer() -> None:
    result = sample(random_logits(4, 100), num_logprobs=[-1, 0, 2, 5])
    assert np.isnan(result.logprobs).tolist() == [True, False, False, False]
    assert result.ranks.tolist() == [0, 1, 1, 1]
    assert (result.top_tokens >= 0).sum(1).tolist() == [0, 0, 2, 5]
    assert np.isnan(result.top_logprobs).sum(1).tolist() == [5, 5, 3, 0]


LIKELY = 30  # tokens that mixed_rows are most likely to give, and that their histories hold


def mixed_rows(rows: int, vocab: int) -> np.ndarray:
    logits = random_logits(rows, vocab)
    logits[:, :LIKELY] += 6
    return logits


def random_masks(rows: int, vocab: int, words: int | None = None) -> dict[str, np.ndarray]:
    """Every second token allowed, by chance, and among the likely ones some in every row."""
    words = -(-vocab // 32) if words is None else words
    masks = np.random.default_rng(3).integers(0, 2**32, (rows, words), dtype=np.uint32)
    masks[:, 0] |= 0x0F0F
    return {"masks": masks.reshape(-1), "mask_start": (np.arange(rows + 1) * words).astype(np.int32)}


@pytest.mark.parametrize("words", [1, 3, 5, None])
def test_a_mask_bans_tokens_as_in_the_plain_sampler(words: int | None) -> None:
    rows, vocab = 40, 133
    batch = replace(mixed_batch(rows, vocab), **random_masks(rows, vocab, words))
    logits = mixed_rows(rows, vocab)
    plain, native = sampling.sample(logits, batch), run(logits, batch)
    assert native.tokens.tolist() == plain.tokens.tolist()
    np.testing.assert_array_equal(native.ranks, plain.ranks)
    np.testing.assert_allclose(native.logprobs, plain.logprobs, rtol=1e-4)
    for r, token in enumerate(native.tokens.tolist()):
        mask = batch.masks[batch.mask_start[r] : batch.mask_start[r + 1]]
        assert token // 32 < len(mask) and mask[token // 32] >> (token % 32) & 1


def test_a_mask_without_a_token_and_damaged_logits_give_no_token() -> None:
    logits = random_logits(3, 70)
    logits[1, 69], logits[2, 69] = np.nan, np.inf
    masks = np.array([[0, 0, 0], [1, 0, 0], [1, 0, 0]], np.uint32).reshape(-1)
    batch = sampling_batch(3, masks=masks, mask_start=np.arange(4, dtype=np.int32) * 3)
    assert run(logits, batch).tokens.tolist() == [-1, -1, -1] == sampling.sample(logits, batch).tokens.tolist()


def mixed_batch(rows: int, vocab: int) -> SamplingBatch:
    """Every row with other parameters, histories and biases."""
    rng = np.random.default_rng(1)
    return sampling_batch(
        rows,
        temperature=rng.choice(np.array([0, 0.7, 1.5], np.float32), rows),
        top_k=rng.choice(np.array([0, 0, 40, 2000], np.int32), rows),
        top_p=rng.choice(np.array([1, 1, 0.9, 0.4], np.float32), rows),
        min_p=rng.choice(np.array([0, 0, 0.05], np.float32), rows),
        seeds=rng.integers(0, 2**63, rows).astype(np.uint64),
        positions=rng.integers(0, 1000, rows),
        num_logprobs=rng.choice(np.array([-1, 0, 5], np.int32), rows),
        repetition=np.full(rows, 1.2, np.float32),
        frequency=np.full(rows, 0.3, np.float32),
        history=rng.integers(0, LIKELY, 10 * rows).astype(np.int32),
        history_start=(np.arange(rows + 1) * 10).astype(np.int32),
        history_outputs=np.full(rows, 4, np.int32),
        bias_tokens=rng.integers(0, vocab, 2 * rows).astype(np.int32),
        bias_values=rng.choice(np.array([-np.inf, 3], np.float32), 2 * rows),
        bias_start=(np.arange(rows + 1) * 2).astype(np.int32),
        **random_masks(rows, vocab),
    )


def rows_of(batch: SamplingBatch, rows: np.ndarray) -> SamplingBatch:
    """Some rows of a mixed_batch, in any order."""
    words = int(batch.mask_start[1])
    flat = {"history": 10, "bias_tokens": 2, "bias_values": 2, "masks": words}
    starts = {"history_start": 10, "bias_start": 2, "mask_start": words}
    fields = {name: getattr(batch, name) for name in batch.__slots__}
    return SamplingBatch(
        **{
            name: array.reshape(-1, flat[name])[rows].reshape(-1)
            if name in flat
            else (np.arange(len(rows) + 1) * starts[name]).astype(np.int32)
            if name in starts
            else array[rows]
            for name, array in fields.items()
        }
    )


def test_a_row_gives_the_same_bits_in_any_company() -> None:
    rows, vocab = 48, 5000
    logits, batch = mixed_rows(rows, vocab), mixed_batch(rows, vocab)
    together = run(logits, batch)
    shuffled = np.random.default_rng(2).permutation(rows)
    for some in [shuffled, *(np.array([r]) for r in range(rows))]:
        result = run(logits[some], rows_of(batch, some))
        assert result.tokens.tolist() == together.tokens[some].tolist()
        np.testing.assert_array_equal(result.logprobs, together.logprobs[some])
        np.testing.assert_array_equal(result.ranks, together.ranks[some])
        columns = result.top_tokens.shape[1]
        np.testing.assert_array_equal(result.top_tokens, together.top_tokens[some, :columns])
        np.testing.assert_array_equal(result.top_logprobs, together.top_logprobs[some, :columns])


def test_instruction_sets_draw_the_same_tokens() -> None:
    logits, batch = mixed_rows(48, 49155), mixed_batch(48, 49155)
    tokens = [run(logits, batch, isa).tokens.tolist() for isa in ISAS]
    assert all(other == tokens[0] for other in tokens)


def test_arrays_that_do_not_fit_are_refused() -> None:
    logits = random_logits(2, 10)
    with pytest.raises(TypeError, match="temperature"):
        run(logits, sampling_batch(2, temperature=np.zeros(2, np.float64)))
    with pytest.raises(ValueError, match="top_k"):
        run(logits, sampling_batch(2, top_k=np.zeros(3, np.int32)))
    with pytest.raises(ValueError, match="history_start"):
        run(logits, sampling_batch(2, history_start=np.array([0, 0, 5], np.int32)))
    with pytest.raises(ValueError, match="bias_start"):
        run(logits, sampling_batch(2, bias_start=np.array([0, -1, 0], np.int32)))
    with pytest.raises(ValueError, match="row"):
        run(logits, sampling_batch(3))
