"""Which layers are paired, and the file that keeps the choice."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import skd
from skd.analysis.choice import choose_layers
from skd.analysis.layers_file import LayerChoice, read_layers, write_layers
from skd.analysis.pairs import pair_layers
from skd.analysis.profile import SpectralProfile


def teacher_with(hot, depth):
    """A profile whose hottest layers are ``hot``."""
    spectra = [torch.tensor([2.0 if layer in hot else 1.0], dtype=torch.float64) for layer in range(depth)]
    return SpectralProfile(
        layers=tuple(f"blocks.{i}" for i in range(depth)),
        intensity=spectra,
        channels=(1,) * depth,
        entropy=None,
        images=1,
        norm="ortho",
        title="teacher",
    )


CAIT = [0, 1, 18, 19, 20, 21, 22, 23]


def test_spectralkd_s_own_pairs():
    assert pair_layers(12, 24, 8) == ([0, 1, 6, 7, 8, 9, 10, 11], CAIT)
    assert skd.pair_layers(12, teacher_with(CAIT, 24), 8) == ([0, 1, 6, 7, 8, 9, 10, 11], CAIT)
    assert pair_layers(4, 4, 4) == ([0, 1, 2, 3], [0, 1, 2, 3]), "Swin's stages"


def test_of_a_depth_the_first_quarter_rounded_down_and_the_last():
    assert [pair_layers(12, 12, k)[1] for k in (1, 3, 4, 5)] == [[11], [9, 10, 11], [0, 9, 10, 11], [0, 8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("student", "teacher", "hot", "expected"),
    [
        (24, 24, [3, 12, 20], [3, 12, 20]),  # one to one
        (12, 24, [5, 6, 22], [5, 6, 10]),
        (12, 24, [8, 9, 20, 21], [6, 7, 8, 9]),  # the later layers keep their place, the earlier give way
        (12, 24, [10, 11, 12, 13], [0, 1, 2, 3]),  # 12 and 13 are student layers 0 and 1, with no room before them
        (24, 12, [0, 5, 6, 11], [0, 5, 18, 23]),  # a deeper student
        (6, 5, [2], [3]),  # the middle of five is the third from the back
        (3, 24, [21, 22, 23], [0, 1, 2]),
        (3, 24, [0, 1, 2], [0, 1, 2]),
        (4, 3, [0, 1, 2], [0, 2, 3]),  # stages of pyramids: the last with the last
    ],
)
def test_pairs_keep_the_distance_from_the_nearer_end(student, teacher, hot, expected):
    assert pair_layers(student, teacher_with(hot, teacher), len(hot)) == (expected, hot)


@st.composite
def choices(draw):
    student, teacher = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    k = draw(st.integers(1, min(student, teacher)))
    hot = draw(st.permutations(range(teacher)))[:k]
    return student, teacher, sorted(hot)


@given(choices(), st.booleans())
def test_any_choice_gives_rising_pairs_in_range(choice, by_depth):
    student, teacher, hot = choice
    given_teacher = teacher if by_depth else teacher_with(hot, teacher)
    student_ids, teacher_ids = pair_layers(student, given_teacher, len(hot))
    assert len(student_ids) == len(teacher_ids) == len(hot)
    for ids, depth in ((student_ids, student), (teacher_ids, teacher)):
        assert all(0 <= i < depth for i in ids) and all(a < b for a, b in zip(ids, ids[1:], strict=False))
    assert by_depth or teacher_ids == hot
    assert student != teacher or student_ids == teacher_ids
    assert pair_layers(student, given_teacher, len(hot)) == (student_ids, teacher_ids)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((12, 24, 13), ValueError, "k=13 pairs need 13 layers of the student, which has 12; give k=12 or less"),
        ((24, 12, 13), ValueError, "13 layers of the teacher, which has 12"),
        ((24, teacher_with([], 3), 4), ValueError, "4 layers of the teacher, which has 3"),
        ((12, 24, 0), ValueError, "k is 0; it must be at least 1"),
        ((0, 24, 1), ValueError, "student_depth is 0"),
        ((12, -1, 1), ValueError, "the teacher's depth is -1"),
        ((12.0, 24, 1), TypeError, "student_depth is a whole number, not 12.0"),
        ((12, "cait", 1), TypeError, "the teacher's depth is a whole number or a SpectralProfile, not 'cait'"),
        ((12, 24, True), TypeError, "k is a whole number, not True"),
    ],
)
def test_impossible_pairs_get_a_sentence(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        pair_layers(*arguments)


# --- The file ---

yaml = pytest.importorskip("yaml", reason="the layers file is YAML (extra 'train')")


def test_the_file_says_what_and_why_and_is_read_back(tmp_path):
    choice, reasons = choose_layers(teacher_with(CAIT, 24), "deit", [f"blocks.{i}" for i in range(12)], 8)
    path = tmp_path / "layers.yaml"
    write_layers(path, choice, reasons)
    assert read_layers(path, 12, 24) == choice == LayerChoice((0, 1, *range(6, 12)), tuple(CAIT), "deit", "teacher")
    lines = path.read_text().splitlines()
    assert lines[-2:] == ["student_layers: [0, 1, 6, 7, 8, 9, 10, 11]", f"teacher_layers: {CAIT}"]
    comment = [line for line in lines if line.startswith("#")]
    assert any("greatest mean spectral intensity" in line for line in comment)
    assert any("blocks.11  teacher blocks.23" in line for line in comment), "the layers by name"


def test_names_and_negative_numbers_are_layers_too(tmp_path):
    path = tmp_path / "layers.yaml"
    path.write_text("student_layers: [-1, blocks.2]\nteacher_layers:\n- -1\n- layer3\n")
    assert read_layers(path, 3, 1) == LayerChoice((-1, "blocks.2"), (-1, "layer3"))
    long = LayerChoice(tuple(f"a.very.long.name.of.a.block.{i}" for i in range(40)), tuple(range(40)), "a: b", "c # d")
    write_layers(path, long)
    assert read_layers(path) == long


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("student_layers: [0\n", r"is no YAML \(line 2: "),
        ("", "holds no keys; it needs student_layers and teacher_layers"),
        ("- 1\n", "holds no keys"),
        ("student_layers: [0]\nteacher_layers: [0]\nlayer: 3\n", "has unknown keys: layer; it takes student, teacher"),
        ("student_layers: [0]\n", "teacher_layers in the layers file .* is missing"),
        ("student_layers: []\nteacher_layers: [0]\n", r"student_layers in the layers file .* is \[\]"),
        ("student_layers: 3\nteacher_layers: [0]\n", "student_layers in the layers file .* is 3"),
        ("student_layers: [0, 1]\nteacher_layers: [0]\n", "pairs 2 student layers with 1 teacher layers"),
        ("student_layers: [0.5]\nteacher_layers: [0]\n", "0.5 in student_layers .* is no block number"),
        ("student_layers: [yes]\nteacher_layers: [0]\n", "True in student_layers .* is no block number"),
        ("student_layers: [12]\nteacher_layers: [0]\n", "no layer 12 for student_layers .* has 12, .* -12 to 11"),
        ("student_layers: [0]\nteacher_layers: [-25]\n", "no layer -25 for teacher_layers"),
        ("student: [1]\nstudent_layers: [0]\nteacher_layers: [0]\n", r"student in .* name of a model, not \[1\]"),
        ("a: !!python/object/apply:os.getcwd []\n", "is no YAML"),
    ],
)
def test_mistakes_in_the_file_get_a_sentence(tmp_path, text, sentence):
    path = tmp_path / "layers.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_layers(path, 12, 24)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_layers(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read: "):
        read_layers(tmp_path / "binary.yaml")


def test_what_makes_a_choice_doubtful_is_said():
    teacher = teacher_with([0], 2)
    object.__setattr__(teacher, "norm", "forward")
    object.__setattr__(teacher, "channels", (1, 2))
    object.__setattr__(teacher, "random_weights", True)
    _, reasons = choose_layers(teacher, "student", ["a", "b"], 1)
    assert any("favours the narrow ones" in line for line in reasons)
    assert any("random: this choice means nothing" in line for line in reasons)
