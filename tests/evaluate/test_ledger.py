"""The ledger: outcomes on disk, batches kept by stopped runs, worst cases, and survival under redraws."""

import itertools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.tree_util import Partial

from rbf_jax import evaluate
from rbf_jax.evaluate import fingerprint
from rbf_jax.evaluate.ledger import Outcomes, Parts
from rbf_jax.types import AttackResult

KEY = jax.random.key(5)
COUNT = 11


class Watch:
    """Takes note of the batches that are really computed, by their first pixel; can stop a run at one of them."""

    # What lies in slots does not tell one computation from another.
    __slots__ = ("seen", "stop_at")

    def __init__(self):
        self.seen = []
        self.stop_at = None

    def __call__(self, images):
        def note(pixel):
            if len(self.seen) == self.stop_at:
                raise RuntimeError("killed")
            self.seen.append(float(pixel))
            return np.float32(0)

        return io_callback(note, jax.ShapeDtypeStruct((), jnp.float32), images[0, 0, 0, 0])

    def batches(self, images, size):
        """Which batches were computed, in order."""
        starts = {float(images[start, 0, 0, 0]): start // size for start in range(0, len(images), size)}
        return [starts[pixel] for pixel in self.seen]


def chance(keys):
    """A number in [0, 1) for each key, ``(B, 1)``, from its bits: they are random enough, and compile at once."""
    return (jax.random.key_data(keys)[:, 1:] % jnp.uint32(1000)).astype(jnp.float32) / 1000


def noisy(weights, key, images):
    """A linear model plus noise under each example's own key."""
    noise = 2 * jnp.cos(2 * jnp.pi * (chance(key) + jnp.arange(3, dtype=jnp.float32) / 3))
    return images.reshape(images.shape[0], -1) @ weights + noise


def jitter(keys, logits_fn, images, labels, *, epsilon=None, targets=None, start=None):
    """An attack at random, each example under its own key."""
    moved = jnp.clip(images + 0.2 * (chance(keys)[..., None, None] - 0.5), 0, 1)
    counts = jnp.ones(images.shape[0], jnp.int32)
    success = logits_fn(keys, moved).argmax(-1) != labels
    return AttackResult(moved, success, jnp.abs(moved - images).max((1, 2, 3)), counts, 0 * counts, 0 * counts)


def watched(watch, run):
    """A model (or an attack) whose runs are noted."""
    if run == "survival":
        return lambda weights, key, images: noisy(weights, key, images) + watch(images)

    def attack(keys, logits_fn, images, labels, **rest):
        result = jitter(keys, logits_fn, images, labels, **rest)
        return result._replace(distance=result.distance + watch(images))

    return attack


class Computation:
    """`survival` (one redraw) or `run_attack` with everything but what a test changes, and its results as a tuple."""

    def __init__(self, run):
        self.run = run
        self.watch = Watch()
        rng = np.random.default_rng(1)
        self.function: Any = watched(self.watch, run)
        self.weights = jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)
        self.images = rng.uniform(size=(COUNT, 4, 4, 1)).astype(np.float32)
        self.labels = np.arange(COUNT, dtype=np.int32) % 3

    def __call__(self, *, key=KEY, weights=None, images=None, labels=None, **options: Any):
        weights = self.weights if weights is None else weights
        data = self.images if images is None else images, self.labels if labels is None else labels
        options.setdefault("batch_size", 4)
        if self.run == "survival":
            options.setdefault("redraws", 1)
            model = Partial(self.function, weights)
            return (evaluate.survival(key, model, *data, **options),)
        return tuple(evaluate.run_attack(key, self.function, Partial(noisy, weights), *data, **options))

    def computed(self, size=4):
        return self.watch.batches(self.images, size)


@pytest.fixture(scope="module", params=["survival", "run_attack"])
def compiled_once(request):
    return Computation(request.param)


@pytest.fixture
def computation(compiled_once):
    compiled_once.watch.seen.clear()
    compiled_once.watch.stop_at = None
    return compiled_once


@pytest.fixture
def model():
    return Partial(noisy, jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32))


@pytest.fixture
def images():
    return np.random.default_rng(1).uniform(size=(COUNT, 4, 4, 1)).astype(np.float32)


@pytest.fixture
def labels():
    return np.arange(COUNT, dtype=np.int32) % 3


def equal(a, b):
    """The same arrays: values, shapes and dtypes."""
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x, y) for x, y in zip(a, b, strict=True)
    )


def make_outcomes(examples=COUNT, selection=5, scoring=3):
    rng = np.random.default_rng(examples)
    return Outcomes(
        rng.permutation(10_000)[:examples].astype(np.int64),
        rng.random((selection, examples)) < 0.5,
        rng.random((scoring, examples)) < 0.5,
        {"attack": "pgd", "epsilon": 0.3, "steps": [1, 2], "norm": None, "name": "ε = ∞", "nested": {"done": True}},
    )


def assert_same_outcomes(got, expected):
    assert isinstance(got, Outcomes)
    assert equal(got[:3], expected[:3])
    assert got.facts == expected.facts


# Fingerprints.


def tree():
    return {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": [jnp.ones(2), jax.random.key(0)]}


def test_equal_trees_have_one_fingerprint():
    assert fingerprint(tree(), np.arange(3)) == fingerprint(tree(), np.arange(3))
    assert len(fingerprint(tree())) == 64
    int(fingerprint(tree()), 16)


def test_where_an_array_lives_does_not_matter():
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert fingerprint(a) == fingerprint(jnp.asarray(a)) == fingerprint(np.asfortranarray(a))
    assert fingerprint(a) == fingerprint(np.repeat(a, 2, 1)[:, ::2])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.array([1, 2, 3], np.float32), np.array([1, 2, 3.0000005], np.float32)),
        (np.zeros(4, np.float32), np.zeros(4, np.int32)),
        (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32)),
        (np.zeros((1, 3), np.float32), np.zeros(3, np.float32)),
        (np.float32(1), np.ones(1, np.float32)),
        (np.zeros((0, 3), np.float32), np.zeros((0, 4), np.float32)),
        (np.array([0.0], np.float32), np.array([-0.0], np.float32)),
        ([np.zeros(1), np.ones(1)], [np.ones(1), np.zeros(1)]),
        ([np.zeros(1)], [np.zeros(1), np.zeros(1)]),
        (jax.random.key(0), jax.random.key(1)),
        (jax.random.key(0), jax.random.split(jax.random.key(0), 1)),
    ],
)
def test_what_differs_has_another_fingerprint(a, b):
    assert fingerprint(a) != fingerprint(b)


def test_fingerprints_of_bfloat16():
    a, b = jnp.ones(3, jnp.bfloat16), jnp.full(3, 2, jnp.bfloat16)
    assert fingerprint(a) == fingerprint(a + 0 * b) != fingerprint(b)


def test_the_arrays_of_a_partial_count(model):
    assert fingerprint(model) != fingerprint(Partial(noisy, model.args[0] + 1))


# Outcomes.


@pytest.mark.parametrize("examples", [1, 7, 8, 9, 16, 1003])
@pytest.mark.parametrize(("selection", "scoring"), [(5, 3), (0, 1), (0, 4)])
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_outcomes_come_back(tmp_path, examples, selection, scoring, kind):
    path = kind(tmp_path / "new" / "outcomes.npz")
    outcomes = make_outcomes(examples, selection, scoring)
    evaluate.save_outcomes(path, outcomes)
    assert_same_outcomes(evaluate.load_outcomes(path), outcomes)


def test_saved_again_they_replace_the_old(tmp_path):
    for outcomes in (make_outcomes(16), make_outcomes(5)):
        evaluate.save_outcomes(tmp_path / "o.npz", outcomes)
    assert_same_outcomes(evaluate.load_outcomes(tmp_path / "o.npz"), make_outcomes(5))
    assert [entry.name for entry in tmp_path.iterdir()] == ["o.npz"]


def test_outcomes_are_written_under_any_name(tmp_path):
    for outcomes in (make_outcomes(16), make_outcomes(5)):
        evaluate.save_outcomes(tmp_path / "out", outcomes)
        assert_same_outcomes(evaluate.load_outcomes(tmp_path / "out"), outcomes)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["selection", "scoring"])
def test_outcomes_of_other_examples_than_the_rows_are_refused(tmp_path, name):
    outcomes = make_outcomes(16)._replace(**{name: np.ones((3, 4), bool)})
    with pytest.raises(ValueError, match=rf"{name} must be \(redraws, 16\).*got \(3, 4\)"):
        evaluate.save_outcomes(tmp_path / "o.npz", outcomes)


def test_eight_outcomes_take_a_byte(tmp_path):
    # Random bits do not compress: one file has 8000 bytes of them more than the other.
    sizes = []
    for scoring in (8, 72):
        evaluate.save_outcomes(tmp_path / "o.npz", make_outcomes(1000, 0, scoring))
        sizes.append((tmp_path / "o.npz").stat().st_size)
    assert sizes[1] - sizes[0] == pytest.approx(64 * 1000 / 8, rel=0.05)


@pytest.mark.parametrize("rows", [[7, 3, 3, 60_000, 0], [0], [2**31 - 1], []])
def test_rows_come_back_in_any_order(rows, tmp_path):
    right = np.zeros((1, len(rows)), bool)
    outcomes = Outcomes(np.array(rows, np.int64), right, right, {})
    evaluate.save_outcomes(tmp_path / "o.npz", outcomes)
    assert_same_outcomes(evaluate.load_outcomes(tmp_path / "o.npz"), outcomes)


def test_rows_of_a_whole_data_set_take_next_to_nothing(tmp_path):
    right = np.ones((1, 10_000), bool)
    evaluate.save_outcomes(tmp_path / "o.npz", Outcomes(np.arange(10_000), right[:0], right, {}))
    assert (tmp_path / "o.npz").stat().st_size < 2_000


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.npz"):
        evaluate.load_outcomes(tmp_path / "missing.npz")


def npy(array):
    def write(path):
        with path.open("wb") as file:
            np.save(file, array)

    return write


def npz(**arrays):
    def write(path):
        with path.open("wb") as file:
            np.savez(file, **arrays)

    return write


FOREIGN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a ledger"),
    "image": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "zip_magic": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"rows": [1]})),
    "npy": npy(np.arange(3)),
    "object_npy": npy(np.array([{}], dtype=object)),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize(
    "write",
    [
        *FOREIGN.values(),
        npz(),
        npz(rows=np.arange(3)),
        npz(rows=np.arange(3), selection=np.zeros((1, 1)), scoring=np.zeros((1, 1)), facts=np.array("{}")),
        npz(
            rows=np.arange(3),
            selection=np.zeros((1, 1), np.uint8),
            scoring=np.zeros((1, 1), np.uint8),
            facts=np.array("{"),
        ),
    ],
    ids=[*FOREIGN, "no_arrays", "other_arrays", "floats_for_bits", "broken_facts"],
)
def test_something_else_is_named(tmp_path, write):
    write(tmp_path / "foreign.npz")
    with pytest.raises(ValueError, match=r"foreign\.npz"):
        evaluate.load_outcomes(tmp_path / "foreign.npz")


def test_truncated_outcomes_are_named(tmp_path):
    path = tmp_path / "cut.npz"
    evaluate.save_outcomes(path, make_outcomes())
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.npz"):
            evaluate.load_outcomes(path)


def escapes(path, read, same):
    """Inverts each byte of a file in turn: the read must raise ValueError naming it, or the byte did not matter.

    Returns what came out instead: by exception type, the first byte that caused it.
    """
    whole = path.read_bytes()
    found, noticed = {}, 0
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :])
        try:
            if not same(read()):
                found.setdefault("wrong result", i)
        except Exception as error:
            named = isinstance(error, ValueError) and path.name in str(error)
            noticed += named
            if not named:
                found.setdefault(type(error).__name__, (i, str(error)[:80]))
    assert noticed > len(whole) / 4
    return found


def test_a_damaged_byte_is_noticed_or_does_not_matter(tmp_path):
    path = tmp_path / "o.npz"
    outcomes = make_outcomes(20, 1, 1)
    evaluate.save_outcomes(path, outcomes)

    def same(got):
        return equal(got[:3], outcomes[:3]) and got.facts == outcomes.facts

    assert not escapes(path, lambda: evaluate.load_outcomes(path), same)


# The batches of a computation.


def three_arrays():
    return np.arange(6, dtype=np.float32).reshape(2, 3), np.array([True, False]), np.arange(2, dtype=np.int32)


def forbidden():
    raise AssertionError("computed again")


FACTS = {"attack": "pgd", "steps": 40, "epsilon": 0.3, "form": None, "norms": ["linf", "l2"]}


def test_a_folder_is_made_and_opened_again(tmp_path):
    parts = Parts(tmp_path / "a" / "parts", FACTS)
    parts.open("abc", 4)
    assert parts.directory.is_dir()
    parts.kept(0, three_arrays)
    # The same facts, told in another order and with a tuple for a list.
    again = Parts(parts.directory, dict(reversed(FACTS.items())) | {"norms": ("linf", "l2")})
    again.open("abc", 4)
    assert equal(again.kept(0, forbidden), three_arrays())


@pytest.mark.parametrize(
    ("facts", "inputs", "batch_size"),
    [
        (FACTS, "abd", 4),
        (FACTS, "", 4),
        (FACTS, "abc", 5),
        (FACTS | {"steps": 41}, "abc", 4),
        (FACTS | {"form": "predict"}, "abc", 4),
        (FACTS | {"more": 1}, "abc", 4),
        ({}, "abc", 4),
    ],
)
def test_a_folder_of_another_computation(tmp_path, facts, inputs, batch_size):
    parts = Parts(tmp_path / "parts", FACTS)
    parts.open("abc", 4)
    parts.kept(0, three_arrays)
    with pytest.raises(ValueError, match="parts"):
        Parts(tmp_path / "parts", facts).open(inputs, batch_size)
    parts.open("abc", 4)
    assert equal(parts.kept(0, forbidden), three_arrays())


@pytest.mark.parametrize(
    ("change", "others"),
    [
        ({"inputs": "def"}, "attack, weights or images"),
        ({"batch_size": 5}, "batch size"),
        ({"facts": {}}, "facts"),
        ({"facts": {}, "batch_size": 5}, "facts and batch size"),
    ],
)
def test_a_folder_of_another_computation_says_what_differs(tmp_path, change, others):
    given = {"facts": FACTS, "inputs": "abc", "batch_size": 4}
    Parts(tmp_path, FACTS).open("abc", 4)
    given |= change
    with pytest.raises(ValueError, match=f"holds another computation: of other {others}[.] Remove"):
        Parts(tmp_path, given["facts"]).open(given["inputs"], given["batch_size"])


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null"])
def test_a_folder_whose_inputs_are_damaged(tmp_path, content):
    parts = Parts(tmp_path / "parts", FACTS)
    parts.open("abc", 4)
    (path,) = parts.directory.glob("*.json")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="parts"):
        parts.open("abc", 4)


def test_a_batch_is_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return three_arrays()

    for _ in range(3):
        assert equal(Parts(tmp_path, {}).kept(4, compute), three_arrays())
    assert len(calls) == 1
    Parts(tmp_path, {}).kept(8, compute)
    assert len(calls) == 2


def test_many_arrays_keep_their_order(tmp_path):
    arrays = tuple(np.full(2, i) for i in range(25))
    Parts(tmp_path, {}).kept(0, lambda: arrays)
    assert equal(Parts(tmp_path, {}).kept(0, forbidden), arrays)


def test_starts_beyond_six_digits_do_not_meet(tmp_path):
    starts = [1, 10, 100_000, 1_000_000, 10_000_000]
    for start in starts:
        Parts(tmp_path, {}).kept(start, lambda start=start: (np.array([start]),))
    assert [int(Parts(tmp_path, {}).kept(start, forbidden)[0][0]) for start in starts] == starts


def test_a_computation_that_fails_keeps_nothing(tmp_path):
    def failing():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Parts(tmp_path, {}).kept(0, failing)
    assert equal(Parts(tmp_path, {}).kept(0, three_arrays), three_arrays())


@pytest.mark.parametrize("write", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_batch_is_named(tmp_path, write):
    Parts(tmp_path, {}).kept(4, three_arrays)
    (path,) = tmp_path.iterdir()
    path.unlink()
    write(path)
    with pytest.raises(ValueError, match=path.name):
        Parts(tmp_path, {}).kept(4, three_arrays)


def test_a_truncated_batch_is_named(tmp_path):
    Parts(tmp_path, {}).kept(4, three_arrays)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=path.name):
            Parts(tmp_path, {}).kept(4, three_arrays)
    path.unlink()
    assert equal(Parts(tmp_path, {}).kept(4, three_arrays), three_arrays())


def test_a_damaged_byte_of_a_batch_is_noticed_or_does_not_matter(tmp_path):
    Parts(tmp_path, {}).kept(4, three_arrays)
    (path,) = tmp_path.iterdir()

    def same(got):
        return equal(got, three_arrays())

    assert not escapes(path, lambda: Parts(tmp_path, {}).kept(4, forbidden), same)


def test_seconds_are_kept_with_the_batches(tmp_path):
    assert Parts(tmp_path, {}).seconds() == 0
    sums = []
    for start in (0, 4, 8):
        Parts(tmp_path, {}).kept(start, three_arrays)
        sums.append(Parts(tmp_path, {}).seconds())
    assert 0 < sums[0] < sums[1] < sums[2]
    Parts(tmp_path, {}).kept(4, forbidden)
    assert Parts(tmp_path, {}).seconds() == sums[2]


# Runs that were stopped.


def test_kept_parts_change_nothing(computation, tmp_path):
    plain = computation()
    assert computation.computed() == [0, 1, 2]
    assert equal(computation(parts=Parts(tmp_path / "a" / "parts", {})), plain)
    assert computation.computed() == [0, 1, 2] * 2
    assert equal(computation(parts=Parts(tmp_path / "a" / "parts", {})), plain)
    assert computation.computed() == [0, 1, 2] * 2


@pytest.mark.parametrize("done", [0, 2])
def test_a_stopped_run_goes_on(computation, tmp_path, done):
    plain = computation()
    computation.watch.seen.clear()
    computation.watch.stop_at = done
    with pytest.raises(jax.errors.JaxRuntimeError, match="killed"):
        computation(parts=Parts(tmp_path, {}))
    assert computation.computed() == list(range(done))
    computation.watch.stop_at = None
    assert equal(computation(parts=Parts(tmp_path, {})), plain)
    # Each batch once in both runs together: what was kept was not computed again.
    assert computation.computed() == [0, 1, 2]


def test_what_a_kill_left_behind_is_not_read(computation, tmp_path):
    plain = computation(parts=Parts(tmp_path, {}))
    computation.watch.seen.clear()
    last = max(tmp_path.glob("*.npz"))
    last.rename(last.with_name(f".{last.name}.x.tmp.npz"))
    last.with_name(f".{last.name}.x.tmp.npz").write_bytes(b"half")
    assert equal(computation(parts=Parts(tmp_path, {})), plain)
    assert computation.computed() == [2]


@pytest.mark.parametrize("name", ["key", "weights", "images", "labels", "rows", "batch_size"])
def test_parts_of_other_inputs(computation, tmp_path, name):
    changed = {
        "key": jax.random.key(6),
        "weights": computation.weights.at[3, 1].add(1e-3),
        "images": np.where(np.arange(COUNT)[:, None, None, None] == 9, np.float32(0.5), computation.images),
        "labels": np.where(np.arange(COUNT) == 10, np.int32(0), computation.labels),
        "rows": np.arange(COUNT) + 1,
        "batch_size": 5,
    }
    before = computation(parts=Parts(tmp_path / "parts", {}))
    with pytest.raises(ValueError, match="parts"):
        computation(parts=Parts(tmp_path / "parts", {}), **{name: changed[name]})
    computation.watch.seen.clear()
    assert equal(computation(parts=Parts(tmp_path / "parts", {})), before)
    assert computation.computed() == []


def test_rows_that_are_spelled_out_are_the_same_inputs(computation, tmp_path):
    before = computation(parts=Parts(tmp_path, {}))
    computation.watch.seen.clear()
    assert equal(computation(parts=Parts(tmp_path, {}), rows=np.arange(COUNT)), before)
    assert computation.computed() == []


def test_parts_of_other_redraws(model, images, labels, tmp_path):
    evaluate.survival(KEY, model, images, labels, redraws=2, parts=Parts(tmp_path / "parts", {}))
    with pytest.raises(ValueError, match="parts"):
        evaluate.survival(KEY, model, images, labels, redraws=3, parts=Parts(tmp_path / "parts", {}))


def test_parts_of_other_facts(computation, tmp_path):
    before = computation(parts=Parts(tmp_path / "parts", {"epsilon": 0.1}))
    with pytest.raises(ValueError, match="parts"):
        computation(parts=Parts(tmp_path / "parts", {"epsilon": 0.2}))
    assert equal(computation(parts=Parts(tmp_path / "parts", {"epsilon": 0.1})), before)


def test_parts_of_another_kind(images, labels, model, tmp_path):
    evaluate.survival(KEY, model, images, labels, redraws=1, parts=Parts(tmp_path / "parts", {}))
    with pytest.raises(ValueError, match="parts"):
        evaluate.run_attack(KEY, jitter, model, images, labels, parts=Parts(tmp_path / "parts", {}))


def test_a_damaged_batch_of_a_run_is_named(computation, tmp_path):
    computation(parts=Parts(tmp_path, {}))
    paths = sorted(tmp_path.glob("*.npz"))
    assert len(paths) == 3
    for path in paths:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=path.name):
            computation(parts=Parts(tmp_path, {}))
        path.write_bytes(whole)
    paths[1].unlink()
    assert equal(computation(parts=Parts(tmp_path, {})), computation())


# Rows and batches.


@pytest.mark.parametrize("batch_size", [1, 100])
def test_results_do_not_depend_on_the_batches(computation, batch_size):
    # Against batches of 4.
    for got, expected in zip(computation(batch_size=batch_size), computation(), strict=True):
        assert isinstance(got, np.ndarray)
        assert got.dtype == expected.dtype
        assert np.allclose(got, expected, atol=1e-6)


def test_rows_are_what_the_keys_are_taken_by(computation):
    # Some examples out of order: they fare as in the run over all.
    rows = [9, 2, 3, 7, 0]
    options = {"images": computation.images[rows], "labels": computation.labels[rows]}
    got = computation(rows=jnp.asarray(rows), batch_size=5, **options)
    for part, whole in zip(got, computation(), strict=True):
        expected = whole[:, rows] if computation.run == "survival" else whole[rows]
        assert np.allclose(part, expected, atol=1e-6)
    if computation.run == "run_attack":
        assert not np.allclose(computation(**options)[0], got[0], atol=1e-3)


def test_an_attack_by_each_examples_own_key(model, images, labels):
    rows = np.arange(COUNT) * 7 + 1000
    got = evaluate.run_attack(KEY, jitter, model, images, labels, rows=rows, batch_size=4)
    by_itself = jax.jit(jitter)
    for i, row in enumerate(rows):
        alone = by_itself(jax.random.fold_in(KEY, int(row))[None], model, images[i : i + 1], labels[i : i + 1])
        for array, expected in zip(got, alone, strict=True):
            assert np.allclose(array[i], expected[0], atol=1e-6)


@pytest.mark.parametrize("rows", [np.arange(10), np.arange(12), np.arange(11)[:, None], np.int64(3)])
def test_rows_of_a_wrong_shape(computation, rows):
    with pytest.raises(ValueError, match="rows"):
        computation(rows=rows)


# Survival.


def survival_by_hand(key, model, images, labels, redraws, rows):
    right = np.zeros((redraws, len(images)), bool)
    for r in range(redraws):
        for i, row in enumerate(rows):
            own = jax.random.fold_in(jax.random.fold_in(key, r), int(row))
            logits = np.asarray(model(own[None], images[i : i + 1])[0])
            right[r, i] = np.argmax(logits) == labels[i]
    return right


@pytest.mark.parametrize(
    ("redraws", "batch_size", "rows"),
    [
        (1, 4, None),
        (6, 1, None),
        (6, 4, np.array([40, 3, 3, 0, 9999, 8, 7, 6, 5, 11, 12])),
        (6, 100, np.arange(COUNT)[::-1]),
    ],
)
def test_survival_against_a_loop(model, images, labels, redraws, batch_size, rows):
    got = evaluate.survival(KEY, model, images, labels, redraws=redraws, rows=rows, batch_size=batch_size)
    expected = survival_by_hand(
        KEY, jax.jit(model), images, labels, redraws, np.arange(COUNT) if rows is None else rows
    )
    assert isinstance(got, np.ndarray)
    assert got.dtype == bool
    assert got.shape == (redraws, COUNT)
    assert np.array_equal(got, expected)
    assert 0 < expected.mean() < 1


def test_redraws_differ_and_the_first_stay(model, images, labels):
    few, many = (evaluate.survival(KEY, model, images, labels, redraws=count) for count in (2, 6))
    assert np.array_equal(many[:2], few)
    # The noise is as strong as the logits: some examples are right under some redraws only.
    assert np.any((many.mean(0) > 0) & (many.mean(0) < 1))


def test_a_deterministic_model_is_the_same_on_every_redraw(images, labels):
    weights = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    model = Partial(lambda w, key, x: x.reshape(x.shape[0], -1) @ w, jnp.asarray(weights))
    expected = (images.reshape(COUNT, -1).astype(np.float64) @ weights).argmax(-1) == labels
    assert np.array_equal(evaluate.survival(KEY, model, images, labels, redraws=3), [expected] * 3)


@pytest.mark.parametrize("bad", [[0], [1], [0, 1, 2]])
def test_logits_with_a_nan_are_never_right(images, bad):
    def logits(hole, key, x):
        # Class 1 is the greatest; on dark images some classes are NaN.
        dark = (x[:, 0, 0, 0] < 0.5)[:, None]
        return jnp.where(dark & hole, jnp.nan, jnp.float32([0, 1, 0.5]))

    hole = jnp.zeros(3, bool).at[jnp.asarray(bad)].set(True)
    dark = images[:, 0, 0, 0] < 0.5
    assert 0 < dark.sum() < COUNT
    for label in range(3):
        labels = np.full(COUNT, label, np.int32)
        got = evaluate.survival(KEY, Partial(logits, hole), images, labels, redraws=2)
        assert np.array_equal(got, [~dark & (label == 1)] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"redraws": 0}, "redraws .* got 0"),
        ({"redraws": 1.5}, "redraws .* got 1.5"),
        ({"batch_size": 0}, "batch_size .* got 0"),
        ({"key": np.zeros(2, np.uint32)}, "key"),
        ({"images": np.zeros((COUNT, 4, 4, 1), np.uint8)}, "images .* uint8"),
        ({"images": np.full((COUNT, 4, 4, 1), np.nan, np.float32)}, "images .* NaN"),
        ({"labels": np.zeros(3, np.int32)}, r"labels .* shape \(11,\)"),
        ({"labels": np.zeros(COUNT, np.float32)}, "labels .* int32"),
    ],
)
def test_bad_input_of_survival(model, images, labels, tmp_path, change, message):
    arguments = {
        "key": KEY,
        "images": images,
        "labels": labels,
        "redraws": 2,
        "parts": Parts(tmp_path / "parts", {}),
    } | change
    with pytest.raises(ValueError, match=message):
        evaluate.survival(arguments.pop("key"), model, arguments.pop("images"), arguments.pop("labels"), **arguments)
    assert not (tmp_path / "parts").exists()


# The worst case.


def worst_case_by_hand(selection, scoring):
    survived = np.zeros(scoring.shape[1:], bool)
    for n in range(scoring.shape[2]):
        least, worst = None, 0
        for a in range(len(selection)):
            rights = (sum(bool(value) for value in selection[a, :, n]), sum(map(bool, selection[a].flat)))
            if least is None or rights < least:
                least, worst = rights, a
        for r in range(scoring.shape[1]):
            survived[r, n] = scoring[worst, r, n]
    return survived


@pytest.mark.parametrize(
    ("attack_count", "selection", "scoring", "examples"),
    [(1, 1, 1, 1), (3, 4, 5, 40), (5, 7, 2, 33), (4, 1, 1, 20), (2, 2, 6, 6), (3, 3, 3, 3)],
)
def test_worst_case_against_a_loop(rng, attack_count, selection, scoring, examples):
    chosen = rng.random((attack_count, selection, examples)) < 0.6
    scored = rng.random((attack_count, scoring, examples)) < 0.6
    got = evaluate.worst_case(chosen, scored)
    assert got.dtype == bool
    assert got.shape == (scoring, examples)
    assert np.array_equal(got, worst_case_by_hand(chosen, scored))


def test_of_equal_attacks_the_strongest_counts_whatever_their_order():
    # All leave the first example right once; the second attack leaves the fewest of the others.
    selection = np.array([[[1, 1], [0, 1]], [[0, 0], [1, 1]], [[0, 1], [1, 1]]], bool)
    scoring = np.array([[[0, 0]], [[1, 0]], [[0, 0]]], bool)
    for order in itertools.permutations(range(3)):
        assert evaluate.worst_case(selection[[*order]], scoring[[*order]])[0, 0]


def test_the_worst_case_of_a_deterministic_model_is_all_attacks_survived(rng):
    right = rng.random((4, 1, 50)) < 0.7
    assert np.array_equal(evaluate.worst_case(right, right), right.all(0))
    assert np.array_equal(evaluate.worst_case(right[:, :0], right), right.all(0))


def test_without_redraws_to_select_on_there_is_no_worst_case_of_a_noisy_model():
    right = np.ones((2, 3, 4), bool)
    with pytest.raises(ValueError, match="scoring holds 3, got none"):
        evaluate.worst_case(right[:, :0], right)


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 3, 5)])
def test_a_worst_case_needs_the_same_attacks_and_examples(shape):
    with pytest.raises(ValueError, match=r"of the attacks and examples of selection \(2, 3, 4\)"):
        evaluate.worst_case(np.ones((2, 3, 4), bool), np.ones(shape, bool))


def test_the_worst_case_of_scores_it_was_not_chosen_by_is_not_their_least(rng):
    # Equal attacks, right on half of all redraws: the least of them on few redraws lies below, fresh redraws do not.
    selection, scoring = rng.random((2, 8, 3, 2000)) < 0.5
    assert evaluate.worst_case(selection, scoring).mean() == pytest.approx(0.5, abs=0.03)
    assert evaluate.worst_case(selection, selection).mean() < 0.2


def test_outcomes_of_a_run_come_back_as_its_worst_case(model, images, labels, tmp_path):
    results = []
    for i, shade in enumerate((1, 0.5)):
        moved = (images * shade).astype(np.float32)
        selection, scoring = (
            evaluate.survival(jax.random.key(seed), model, moved, labels, redraws=6) for seed in (1, 2)
        )
        outcomes = Outcomes(np.arange(COUNT, dtype=np.int64), selection, scoring, {"shade": shade})
        evaluate.save_outcomes(tmp_path / f"{i}.npz", outcomes)
        results.append(outcomes)
    loaded = [evaluate.load_outcomes(tmp_path / f"{i}.npz") for i in range(2)]
    got = evaluate.worst_case(np.stack([o.selection for o in loaded]), np.stack([o.scoring for o in loaded]))
    expected = worst_case_by_hand(np.stack([o.selection for o in results]), np.stack([o.scoring for o in results]))
    assert np.array_equal(got, expected)
