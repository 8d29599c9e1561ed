import numpy as np
import pytest

from nsa_jax.training.ngram import InterpolatedNgram, interpolated_ngram_bits_per_byte


def test_probabilities_by_hand():
    # Training "aab". Order 1: a twice, b once, 2 different symbols; order 2: after BOS a (once);
    # after a: a once, b once.
    model = InterpolatedNgram([b"aab"], order=2)
    a, b, c = ((count + 2 / 256) / (3 + 2) for count in (2, 1, 0))
    start = model.distribution(b"")
    np.testing.assert_allclose(start[ord("a")], (1 + a) / 2, rtol=1e-12)
    np.testing.assert_allclose(start[ord("b")], (0 + b) / 2, rtol=1e-12)
    after_a = model.distribution(b"a")
    np.testing.assert_allclose(after_a[ord("a")], (1 + 2 * a) / 4, rtol=1e-12)
    np.testing.assert_allclose(after_a[ord("b")], (1 + 2 * b) / 4, rtol=1e-12)
    np.testing.assert_allclose(after_a[ord("c")], (0 + 2 * c) / 4, rtol=1e-12)
    # b was never a history: back to order 1.
    np.testing.assert_allclose(model.distribution(b"b")[ord("a")], a, rtol=1e-12)


def test_bits_are_those_of_the_distributions():
    train, validation = [b"abracadabra", b"cad"], [b"abc", b"", b"zab"]
    model = InterpolatedNgram(train, order=3)
    expected = [
        -np.log2(model.distribution(document[:place])[document[place]])
        for document in validation
        for place in range(len(document))
    ]
    np.testing.assert_allclose(-model.log2_probabilities(validation), expected, rtol=1e-12)
    bits = interpolated_ngram_bits_per_byte(train, validation, order=3)
    np.testing.assert_allclose(bits, np.mean(expected), rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("history", [b"", b"a", b"\x00\xff", b"never seen", bytes(range(256))])
def test_probabilities_sum_to_one(order, history):
    rng = np.random.default_rng(0)
    documents = [bytes(rng.integers(256, size=400, dtype=np.uint8)), b"abababab" * 9, b"\xff" * 20]
    distribution = InterpolatedNgram(documents, order).distribution(history)
    assert distribution.shape == (256,)
    assert (distribution > 0).all()
    np.testing.assert_allclose(distribution.sum(), 1, rtol=1e-12)


def test_only_the_last_symbols_of_the_same_document_matter():
    model = InterpolatedNgram([b"abcabd", b"xyz"], order=3)
    np.testing.assert_array_equal(model.distribution(b"ab"), model.distribution(b"zzzab"))
    assert (model.distribution(b"ab") != model.distribution(b"b")).any()  # BOS, b
    together = model.log2_probabilities([b"abc", b"xyz"])
    alone = [model.log2_probabilities([document]) for document in (b"abc", b"xyz")]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_longer_histories_help_on_a_periodic_text():
    train, validation = [b"abac" * 500], [b"abac" * 20]
    bits = [interpolated_ngram_bits_per_byte(train, validation, order) for order in (1, 2, 3)]
    assert bits[0] > bits[1] > bits[2]
    np.testing.assert_allclose(bits[0], 1.5, atol=0.01)  # the entropy of (1/2, 1/4, 1/4)


def test_nothing_to_count_gives_the_uniform_distribution():
    assert interpolated_ngram_bits_per_byte([], [b"abc"]) == 8


@pytest.mark.parametrize("order", [0, 8, 2.0])
def test_order_out_of_range(order):
    with pytest.raises(ValueError, match=rf"order={order} must be an integer from 1 to 7"):
        InterpolatedNgram([b"a"], order)


def test_nothing_to_predict():
    with pytest.raises(ValueError, match="no byte to predict"):
        interpolated_ngram_bits_per_byte([b"abc"], [b"", b""])
