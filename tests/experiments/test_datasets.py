"""The data sets: shapes, the split, and damaged files."""

import numpy as np
import pytest

from experiments import datasets, sequences, text
from experiments.command import ExperimentError

SETS = {
    "digits": (datasets.digits, 8, 1797, 1797),
    "animals": (datasets.animals, 28, 10_000, 9_716),
}


def distinct(images):
    return {image.tobytes() for image in images}


@pytest.mark.parametrize("name", SETS)
def test_shapes_and_values(name):
    load, side, examples, _ = SETS[name]
    data = load()
    assert len(data.train_inputs) + len(data.test_inputs) == examples
    assert data.train_inputs.shape[1:] == data.test_inputs.shape[1:] == (side, side, 1)
    assert data.train_inputs.dtype == np.float32
    assert data.train_inputs.min() == 0 and data.train_inputs.max() == 1
    assert len(data.train_targets) == len(data.train_inputs)
    assert set(data.test_targets) == set(data.train_targets) == set(range(len(data.classes)))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_image_is_on_both_sides(name, seed):
    load, _, _, different = SETS[name]
    data = load(seed)
    train, test = distinct(data.train_inputs), distinct(data.test_inputs)
    assert not train & test
    assert len(train) + len(test) == different


def test_the_split_follows_the_seed():
    first, again, other = datasets.digits(3), datasets.digits(3), datasets.digits(4)
    np.testing.assert_array_equal(first.test_inputs, again.test_inputs)
    assert distinct(first.test_inputs) != distinct(other.test_inputs)


def test_the_split_keeps_duplicates_together_and_classes_balanced():
    images = np.repeat(np.arange(100, dtype=np.uint8), 2).reshape(200, 1, 1)
    labels = np.repeat([0, 1], 100)
    train, test = datasets.split(images, labels, seed=0)
    assert sorted([*train, *test]) == list(range(200))
    assert not set(images[train].ravel()) & set(images[test].ravel())
    assert np.bincount(labels[test]).tolist() == [20, 20]


def test_mazur_has_no_test_part():
    data = datasets.mazur_example()
    assert data.train_inputs.shape == data.train_targets.shape == (1, 2)
    assert len(data.test_inputs) == 0


def wrong_files(folder):
    good = {"images": np.zeros((4, 28, 28), np.uint8), "labels": np.zeros(4, np.uint8)}
    (folder / "text.npz").write_text("no archive at all")
    (folder / "empty.npz").write_bytes(b"")
    np.savez_compressed(folder / "whole.npz", **good)
    whole = bytearray((folder / "whole.npz").read_bytes())
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    whole[70:90] = bytes(20)
    (folder / "flipped.npz").write_bytes(whole)
    np.savez(folder / "keys.npz", pictures=good["images"])
    np.savez(folder / "shape.npz", images=np.zeros((4, 8, 8), np.uint8), labels=good["labels"])
    np.savez(folder / "labels.npz", images=good["images"], labels=np.full(4, 10, np.uint8))
    np.savez(folder / "dtype.npz", images=np.zeros((4, 28, 28)), labels=good["labels"])
    np.savez(folder / "none.npz", images=good["images"][:0], labels=good["labels"][:0])
    np.save(folder / "array.npy", good["images"])
    (folder / "folder.npz").mkdir()
    return [*folder.glob("[!w]*.np[yz]"), folder / "absent.npz"]  # all but whole.npz


def test_a_wrong_file_is_named_in_one_line_with_a_remedy(tmp_path):
    for file in wrong_files(tmp_path):
        with pytest.raises(ExperimentError) as caught:
            datasets.animals(file=file)
        message = str(caught.value)
        assert str(file) in message and "--data-file" in message and "\n" not in message


def test_a_missing_packaged_file_says_how_to_restore_it(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(ExperimentError, match=r"missing; .*git checkout"):
        datasets.animals()


def test_diabetes_is_standardised_by_its_training_part():
    data = datasets.diabetes()
    assert data.train_inputs.shape == (354, 10) and data.test_targets.shape == (88, 1)
    for part in (data.train_inputs, data.train_targets):
        np.testing.assert_allclose(part.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(part.std(0), 1, atol=1e-5)
    assert not distinct(data.train_inputs) & distinct(data.test_inputs)


def test_sequences_are_drawn_with_the_seed_and_balanced():
    data, again = (sequences.sequences(3, train=80, test=20) for _ in range(2))
    other = sequences.sequences(4, train=80, test=20)
    np.testing.assert_array_equal(data.train_inputs, again.train_inputs)
    assert not np.array_equal(data.train_inputs, other.train_inputs)
    assert data.train_inputs.shape == (80, 40) and data.train_inputs.dtype == np.float32
    labels = np.concatenate([data.train_targets, data.test_targets])
    assert np.bincount(labels).tolist() == [10] * 10


def test_text_is_predicted_one_character_ahead(capsys):
    assert text.zen().startswith("The Zen of Python") and "honking great idea" in text.zen()
    data = text.characters()
    letters = np.array(data.classes)
    assert "".join(letters[data.train_inputs[0]]) == text.text()[: text.LENGTH]
    np.testing.assert_array_equal(data.train_inputs[:, 1:], data.train_targets[:, :-1])
    assert len(data.test_inputs) and data.test_inputs.shape[1] == text.LENGTH
    assert capsys.readouterr().out == ""  # importing `this` prints; not here
