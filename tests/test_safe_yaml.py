"""Safe YAML: arithmetic is evaluated, everything else is refused by name."""

import os

import pytest

from mask2former_plugin.safe_yaml import ConfigFileError, evaluate_arithmetic, load_config_dict, load_yaml


@pytest.mark.parametrize(
    "expression",
    [
        "[int(x * 0.1 * 512) for x in range(5, 21)]",
        "[int(x * 0.1 * 1024) for x in range(5, 21)]",
        "[int(x * 0.1 * 640) for x in range(5, 16)]",
        "1 + 2 * 3 - 4 / 5",
        "7 // 2 + 7 % 4 - (-3) ** 3",
        "+2 ** -2",
        "[(x, y) for x in range(3) for y in range(x)]",
        "[[x * y for x in range(2)] for y in [1, 2.5]]",
        "max(1, 2, min(5, 3))",
        "max([x * x for x in range(-3, 2)])",
        "max(x * x for x in range(-3, 2))",
        "round(2.675, 2)",
        "len([1, 2, 3]) * float(2)",
        "(800,)",
        "()",
        "2 ** 60",
        "[x for x in range(3)] ",
    ],
)
def test_arithmetic_equals_python(expression):
    expected = eval(expression)
    result = evaluate_arithmetic(expression)
    assert result == expected
    assert type(result) is type(expected)


def test_a_range_becomes_a_list():
    assert evaluate_arithmetic("range(2, 11, 3)") == [2, 5, 8]


def test_an_inner_variable_shadows_an_outer_one():
    assert evaluate_arithmetic("[x + max([x for x in range(10)]) * 10 + x for x in range(3)]") == [90, 92, 94]


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("__import__('os').system('true')", "only calls of"),
        ("open('/etc/passwd')", "only calls of"),
        ("().__class__", "Attribute"),
        ("[1, 2][0]", "Subscript"),
        ("'a' * 3", "not a number"),
        ("True", "not a number"),
        ("[0] * 5", "needs numbers"),
        ("lambda: 1", "Lambda"),
        ("x + 1", "'x' is not defined"),
        ("[x for x in range(3) if x]", "comprehension"),
        ("[x for x, y in [(1, 2)]]", "comprehension"),
        ("[x for x in 5]", "must run over"),
        ("{x for x in range(3)}", "SetComp"),
        ("1 if 2 else 3", "IfExp"),
        ("1 < 2", "Compare"),
        ("1 << 200", "LShift"),
        ("9 ** 9 ** 9", "too large"),
        ("10 ** 30", "too large"),
        ("2.0 ** 5000", "34"),  # Python's own OverflowError
        ("1e308 * 10", "not finite"),
        ("(-8) ** 0.5", "real number"),
        ("1 / 0", "division by zero"),
        ("range(10 ** 9)", "elements"),
        ("[x for x in range(10 ** 9)]", "steps"),
        ("len([1 for x in range(500) for y in range(500)])", "steps"),
        ("int('5')", "not a number"),
        ("int(5, base=3)", "without keywords"),
        ("int(range(3))", "int()"),
        ("1 +", "syntax"),
        ("1" + "+1" * 1500, "longer than"),
        ("(" * 400 + "1" + ")" * 400, ""),
    ],
)
def test_everything_else_is_refused(expression, reason):
    with pytest.raises(ValueError, match="cannot evaluate|longer") as error:
        evaluate_arithmetic(expression)
    assert reason in str(error.value)


def test_yaml_with_published_tags():
    text = """
    MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.1 * 640) for x in range(5, 21)]"]
    STEPS: !!python/tuple [1, 2]
    PLAIN: {A: 1.5, B: [x, null]}
    """
    assert load_yaml(text) == {
        "MIN_SIZE_TRAIN": [int(x * 0.1 * 640) for x in range(5, 21)],
        "STEPS": (1, 2),
        "PLAIN": {"A": 1.5, "B": ["x", None]},
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('A: !!python/object/apply:os.system ["true"]', "!!python/object/apply:os.system"),
        ("A: !!python/name:os.system", "!!python/name:os.system"),
        ("A: !!python/object/new:os.system {}", "!!python/object/new:os.system"),
        ("A: 1\nB: !!python/module:os", "file.yaml, line 2"),
        ("A: !!python/object/apply:eval [\"__import__('os')\"]", "only calls of"),
        ('A: !!python/object/apply:eval ["1", "2"]', "one expression"),
        ("A: !!python/object/apply:eval {args: ['1']}", "one expression"),
        ("A: !mine 1", "!mine"),
        ("A: [1", "line"),
        ("A: 1\n\tB: 2", "line 2"),
    ],
)
def test_other_tags_and_broken_yaml_name_file_and_reason(text, reason):
    with pytest.raises(ConfigFileError, match="file.yaml") as error:
        load_yaml(text, "file.yaml")
    assert reason in str(error.value)


def test_nothing_runs(tmp_path):
    victim = tmp_path / "made"
    for text in (
        f'A: !!python/object/apply:os.mkdir ["{victim}"]',
        f"A: !!python/object/apply:eval [\"__import__('os').mkdir('{victim}')\"]",
    ):
        with pytest.raises(ConfigFileError):
            load_yaml(text)
    assert not victim.exists()


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_inheritance(tmp_path):
    write(
        tmp_path,
        base="X: 1\nG: {A: 1, B: 1, C: 1}\nOLD: {Q: 1}",
        second="X: 2\nG: {B: 2, C: 2}",
        child="_BASE_: [base.yaml, second.yaml]\nG: {C: 3}\nOLD: 5\nNEW: {Z: 0}",
    )
    assert load_config_dict(tmp_path / "child.yaml") == {
        "X": 2,
        "G": {"A": 1, "B": 2, "C": 3},
        "OLD": 5,
        "NEW": {"Z": 0},
    }


def test_base_paths_are_relative_to_their_file_absolute_or_at_home(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    write(tmp_path, top="X: 1", absolute="Z: 1", child="_BASE_: sub/middle.yaml")
    write(tmp_path / "sub", middle=f"_BASE_: [../top.yaml, '{tmp_path}/absolute.yaml', '~/home.yaml']\nY: 1")
    home = tmp_path / "home"
    home.mkdir()
    write(home, home="H: 1")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert load_config_dict("child.yaml") == {"X": 1, "Y": 1, "Z": 1, "H": 1}


def test_base_of_a_url_is_relative_to_it(tmp_path):
    write(tmp_path, base="X: 1", child="_BASE_: base.yaml\nY: 1")
    opened = []

    def open_file(path):
        opened.append(path)
        return open(path.replace("test://host/", f"{tmp_path}/"))

    assert load_config_dict("test://host/child.yaml", open_file) == {"X": 1, "Y": 1}
    assert opened == ["test://host/child.yaml", "test://host/base.yaml"]


def test_circles_are_found(tmp_path):
    write(tmp_path, a="_BASE_: b.yaml", b="_BASE_: ./c.yaml", c="_BASE_: a.yaml", own="_BASE_: own.yaml")
    with pytest.raises(ConfigFileError, match=r"circle: .*a\.yaml -> .*b\.yaml -> .*c\.yaml -> .*a\.yaml"):
        load_config_dict(tmp_path / "a.yaml")
    with pytest.raises(ConfigFileError, match="circle"):
        load_config_dict(tmp_path / "own.yaml")


def test_the_same_base_twice_is_no_circle(tmp_path):
    write(tmp_path, base="X: 1", a="_BASE_: base.yaml\nA: 1", b="_BASE_: base.yaml\nB: 1", c="_BASE_: [a.yaml, b.yaml]")
    assert load_config_dict(tmp_path / "c.yaml") == {"X": 1, "A": 1, "B": 1}


def test_missing_files_are_named(tmp_path):
    write(tmp_path, child="_BASE_: nothing.yaml")
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml, the _BASE_ of .*child\.yaml, does not exist"):
        load_config_dict(tmp_path / "child.yaml")
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml does not exist"):
        load_config_dict(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[1, 2]", "mapping"), ("_BASE_: 5", "_BASE_ must be a path"), ("_BASE_: [[x]]", "_BASE_ must be a path")],
)
def test_files_of_another_form(tmp_path, text, reason):
    write(tmp_path, file=text)
    with pytest.raises(ConfigFileError, match=reason):
        load_config_dict(tmp_path / "file.yaml")


def test_a_group_cannot_replace_a_value_of_the_base(tmp_path):
    write(tmp_path, base="G: {X: 1}", child="_BASE_: base.yaml\nG: {X: {Y: 2}}")
    with pytest.raises(ConfigFileError, match=r"child\.yaml: G\.X is a group"):
        load_config_dict(tmp_path / "child.yaml")


def test_an_empty_file_is_an_empty_config(tmp_path):
    write(tmp_path, empty="# nothing\n", base="X: 1", child="_BASE_: [base.yaml, empty.yaml]")
    assert load_config_dict(tmp_path / "empty.yaml") == {}
    assert load_config_dict(os.fspath(tmp_path / "child.yaml")) == {"X": 1}
