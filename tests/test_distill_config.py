"""What a run is told: recipes, the command line on top of them, defaults, and what is refused."""

import dataclasses
import subprocess
import sys
import types

import pytest

pytest.importorskip("tyro", reason="options are parsed by tyro (extra 'train')")
yaml = pytest.importorskip("yaml", reason="recipes are YAML (extra 'train')")

from skd import cli  # noqa: E402
from skd.distill.config import DistillConfig, fill_defaults  # noqa: E402
from skd.distill.config_checks import _IMAGE_OPTIONS, _RANGES  # noqa: E402
from skd.distill.errors import DistillError  # noqa: E402
from skd.distill.eval_config import EvalConfig, check_eval  # noqa: E402
from skd.distill.recipe import config_of_run, list_recipes, load_recipe, to_yaml  # noqa: E402

NAMES = ("deit-small", "deit-tiny", "deit-tiny-logits", "deit-tiny-mse", "digits", "gratings", "swin-tiny")

# SpectralKD's numbers, which all three published recipes share.
PUBLISHED = {
    "data": {
        "image_size": 224,
        "batch_size": 256,
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.4,
        "random_erasing": 0.25,
        "repeats": 3,
        "mixup": 0.0,
        "cutmix": 0.0,
    },
    "models": {"drop_path": 0.0, "layers": None, "train_teacher": False},
    "loss": {
        "alpha": 0.9,
        "tau": 1.0,
        "match": "complex",
        "kd": "soft",
        "kd_reduction": "numel",
        "label_smoothing": 0.1,
    },
    "optim": {
        "lr": None,
        "base_lr": 5e-4,
        "warmup_lr": 1e-6,
        "min_lr": 1e-5,
        "weight_decay": 0.05,
        "schedule": "epoch-late",
        "opt": "adamw",
        "accumulate": 1,
        "clip_grad": None,
        "ema": 0.99996,
    },
    "engine": {"amp": "fp16", "compile": False},
    "run": {"arms": ("spectral",), "seed": 0, "seeds": 1},
}
CAIT = {
    "teacher": "cait_s24_224",
    "student_layers": (0, 1, 6, 7, 8, 9, 10, 11),
    "teacher_layers": (0, 1, 18, 19, 20, 21, 22, 23),
}
SWIN = {
    "teacher": "swin_small_patch4_window7_224.ms_in1k",
    "student": "swin_tiny_patch4_window7_224",
    "student_layers": (0, 1, 2, 3),
    "teacher_layers": (0, 1, 2, 3),
}
TINY = {
    "models": {**CAIT, "student": "deit_tiny_patch16_224"},
    "loss": {"weight": 0.2},
    "optim": {"epochs": 400, "warmup_epochs": 5},
}
OWN = {
    "deit-tiny": TINY,
    "deit-small": {
        "models": {**CAIT, "student": "deit_small_patch16_224"},
        "loss": {"weight": 0.2},
        "optim": {"epochs": 500, "warmup_epochs": 5},
    },
    "swin-tiny": {"models": SWIN, "loss": {"weight": 0.05}, "optim": {"epochs": 500, "warmup_epochs": 20}},
    "deit-tiny-logits": {**TINY, "run": {"arms": ("logits",)}},
    "deit-tiny-mse": {**TINY, "loss": {"weight": 0.2, "match": "mse"}},
}


def write(folder, text, name="mine.yaml"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def changed(section, name, value):
    return DistillConfig().replace(**{section: {name: value}})


def images(**sections):
    """A configuration with images and models, as far as nothing looks at the files."""
    base = DistillConfig().replace(data={"data": "x"}, models={"teacher": "a", "student": "b"})
    return base.replace(**sections)


def with_data(config):
    return config if config.task != "images" else config.replace(data={"data": "x"})


@pytest.fixture
def ran(monkeypatch):
    """The configurations that ``skd distill`` would have run."""
    seen = []
    module = types.SimpleNamespace(run=lambda config: seen.append(config) or 0)
    monkeypatch.setitem(sys.modules, "skd.distill.experiment", module)
    return seen


def distill(*arguments):
    return cli.main(["distill", *map(str, arguments)])


# recipes


def test_the_shipped_recipes_load_and_are_accepted():
    summaries = list_recipes()
    assert tuple(summaries) == NAMES
    for name in NAMES:
        config = load_recipe(name)
        assert summaries[name] and "#" not in summaries[name]
        filled = fill_defaults(with_data(config))
        assert fill_defaults(filled) == filled
        assert None not in (filled.optim.lr, filled.optim.warmup_lr, filled.optim.min_lr, filled.optim.warmup_epochs)


@pytest.mark.parametrize("name", OWN)
def test_published_recipes_have_the_published_numbers(name):
    config = load_recipe(name)
    for section, fields in PUBLISHED.items():
        for field, value in {**fields, **OWN[name].get(section, {})}.items():
            assert getattr(getattr(config, section), field) == value, (section, field)


def test_published_learning_rate_is_that_of_two_processes():
    config = load_recipe("deit-tiny").replace(data={"data": "x"})
    assert fill_defaults(config, processes=2).optim.lr == pytest.approx(5e-4)
    assert fill_defaults(config).optim.lr == pytest.approx(2.5e-4)
    assert fill_defaults(config.replace(optim={"accumulate": 2})).optim.lr == pytest.approx(5e-4)
    filled = fill_defaults(config, processes=2).optim
    assert (filled.warmup_lr, filled.min_lr) == (1e-6, 1e-5)


def test_baselines_differ_from_their_recipe_in_one_field():
    tiny = load_recipe("deit-tiny")
    assert load_recipe("deit-tiny-logits") == tiny.replace(run={"arms": ("logits",)})
    assert load_recipe("deit-tiny-mse") == tiny.replace(loss={"match": "mse"})


def test_digits_is_what_runs_without_options():
    assert fill_defaults(load_recipe("digits")) == fill_defaults(DistillConfig())
    gratings = fill_defaults(load_recipe("gratings"))
    assert gratings == fill_defaults(DistillConfig().replace(data={"dataset": "gratings"}))
    assert gratings.replace(data={"dataset": "digits"}) == fill_defaults(DistillConfig())


def test_recipes_of_both_kinds_are_read_from_yaml(tmp_path):
    path = write(
        tmp_path,
        """
        # a comment
        data: {data: some/where, crop_pct: 1, batch_size: 32}
        models:
          student_layers: [0, blocks.3, -1]
          teacher_checkpoint: ~/t.pth
        optim: {min_lr: 1e-6, lr: 1E-3, ema: null}
        engine:
        run: {arms: [labels, spectral], tensorboard: false, wandb: "on"}
        """,
    )
    config = load_recipe(path)
    assert str(config.data.data) == "some/where" and config.data.batch_size == 32
    assert config.data.crop_pct == 1.0 and isinstance(config.data.crop_pct, float)
    assert config.models.student_layers == (0, "blocks.3", -1)
    assert config.models.teacher_checkpoint.is_absolute() and config.models.teacher_checkpoint.name == "t.pth"
    assert (config.optim.min_lr, config.optim.lr, config.optim.ema) == (1e-6, 1e-3, None)
    assert (config.run.arms, config.run.tensorboard, config.run.wandb) == (("labels", "spectral"), False, "on")
    assert config.engine == DistillConfig().engine


def test_a_recipe_of_comments_is_the_defaults(tmp_path):
    assert load_recipe(write(tmp_path, "# nothing yet\n")) == DistillConfig()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {epoch: 3}", ["mine.yaml", "no field 'epoch' in optim", "did you mean epochs?"]),
        ("data: {batch-size: 3}", ["no field 'batch-size' in data", "did you mean batch_size?"]),
        ("loss: {epochs: 3}", ["no field 'epochs' in loss", "belongs into the section optim"]),
        ("data: {label_smothing: 0}", ["did you mean label_smoothing in the section loss?"]),
        ("data: {zzzzzz: 0}", ["no field 'zzzzzz' in data", "it may have data, dataset"]),
        ("optimm: {epochs: 3}", ["no section 'optimm'", "did you mean optim?"]),
        ("epochs: 3", ["no section 'epochs'", "belongs into the section optim"]),
        ("extend: digits", ["no section 'extend'", "did you mean extends?"]),
        ("qqqqqq: 3", ["no section 'qqqqqq'", "it may have data, models, loss"]),
        ("1: 3", ["no section '1'"]),
        ("optim: 3", ["optim in the recipe", "is 3", "must hold lines of field: value"]),
        ("optim: {epochs: many}", ["optim.epochs", "'many'", "null or a whole number"]),
        ("optim: {epochs: 1.5}", ["optim.epochs", "1.5", "a whole number"]),
        ("optim: {epochs: true}", ["optim.epochs", "True", "a whole number", "put quotes"]),
        ("optim: {weight_decay: }", ["optim.weight_decay", "is empty", "a number"]),
        ("optim: {weight_decay: heavy}", ["optim.weight_decay", "'heavy'", "a number"]),
        ("loss: {match: mze}", ["loss.match", "one of complex, mse", "did you mean mse?"]),
        ("engine: {amp: off}", ["engine.amp", "is False", "one of none, bf16, fp16", "put quotes"]),
        ("engine: {compile: 1}", ["engine.compile", "true or false"]),
        ("models: {teacher: 3}", ["models.teacher", "is 3", "text"]),
        ("models: {student_layers: 3}", ["models.student_layers", "a list", "write [3]"]),
        ("models: {student_layers: [0.5]}", ["models.student_layers", "a whole number or text"]),
        ("run: {arms: spectral}", ["run.arms", "write [spectral]"]),
        ("run: {arms: [labels, specral]}", ["run.arms", "did you mean spectral?"]),
        ("data: {data: [a]}", ["data.data", "a path"]),
        ("run: {seed: 1, seed: 2}", ["no YAML", "line 1", "seed is there twice"]),
        ("run: [1", ["no YAML", "line"]),
        ("- 1", ["holds no sections", "data, models"]),
        ("extends: [digits]", ["extends", "must be the name or path of one recipe"]),
        ("extends: deit-tinny", ["no recipe 'deit-tinny'", "did you mean deit-tiny?"]),
    ],
)
def test_mistakes_in_a_recipe_get_a_sentence(tmp_path, text, words):
    with pytest.raises(DistillError) as caught:
        load_recipe(write(tmp_path, text))
    sentence = str(caught.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(DistillError, match="no recipe 'diet-tiny'; did you mean deit-tiny"):
        load_recipe("diet-tiny")
    with pytest.raises(DistillError, match="there are deit-small, .*, or give the path of a YAML file"):
        load_recipe("zzzzzz")
    with pytest.raises(DistillError, match="is a folder; give a YAML file"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DistillError, match="binary.yaml cannot be read"):
        load_recipe(tmp_path / "binary.yaml")


def test_extends_takes_names_and_paths_relative_to_the_file(tmp_path, monkeypatch):
    write(tmp_path, "extends: deit-small\noptim: {epochs: 7}\n", "a/base.yaml")
    top = write(tmp_path, "extends: ../a/base.yaml\nloss: {weight: 0.5}\n", "b/top.yaml")
    monkeypatch.chdir(tmp_path)
    config = load_recipe(top)
    assert config == load_recipe("deit-small").replace(optim={"epochs": 7}, loss={"weight": 0.5})
    # A file of a shipped recipe's name can extend that recipe.
    assert load_recipe(write(tmp_path, "extends: digits\nrun: {seed: 5}", "digits.yaml")).run.seed == 5


def test_recipes_that_extend_each_other_are_refused(tmp_path):
    write(tmp_path, "extends: b.yaml", "a.yaml")
    write(tmp_path, "extends: a.yaml", "b.yaml")
    with pytest.raises(DistillError, match="circle: a.yaml, which extends b.yaml, which extends a.yaml"):
        load_recipe(tmp_path / "a.yaml")
    with pytest.raises(DistillError, match="circle: self.yaml, which extends self.yaml"):
        load_recipe(write(tmp_path, "extends: self.yaml", "self.yaml"))


def test_of_two_ways_to_say_one_thing_the_later_counts(tmp_path, ran):
    layers = write(tmp_path, "extends: deit-tiny\nmodels: {layers: auto}")
    assert load_recipe(layers).models.student_layers is load_recipe(layers).models.teacher_layers is None
    lists = write(tmp_path, "extends: mine.yaml\nmodels: {student_layers: [0], teacher_layers: [1]}", "lists.yaml")
    assert load_recipe(lists).models.layers is None and load_recipe(lists).models.student_layers == (0,)
    rate = write(tmp_path, "extends: rate.yaml\noptim: {base_lr: 1e-3}", "base.yaml")
    write(tmp_path, "optim: {lr: 1e-2}", "rate.yaml")
    assert load_recipe(rate).optim.lr is None
    # Null takes nothing's place.
    null = write(tmp_path, "extends: deit-tiny\nmodels: {layers: null}", "null.yaml")
    assert load_recipe(null) == load_recipe("deit-tiny")
    # And so on the command line, over a recipe.
    assert distill("--recipe", "deit-tiny", "--data", "x", "--layers", "auto") == 0
    assert ran[-1].models.layers == "auto" and ran[-1].models.student_layers is None
    assert distill("--recipe", tmp_path / "rate.yaml", "--data", "x", "--teacher", "a", "--student", "b") == 0
    assert ran[-1].optim.lr == 1e-2
    both = distill("--layers", "auto", "--student-layers", 0, "--teacher-layers", 0)
    assert both == 2 and len(ran) == 2


# the command line


def test_options_win_over_the_recipe_and_it_over_the_defaults(ran):
    assert distill("--recipe", "deit-tiny", "--data", "x", "--epochs", 7, "--ema", "None", "--match", "mse") == 0
    expected = load_recipe("deit-tiny").replace(optim={"epochs": 7, "ema": None}, loss={"match": "mse"})
    assert ran[0].replace(data={"data": None}) == expected
    assert str(ran[0].data.data) == "x"
    assert ran[0].loss.weight == 0.2 and ran[0].loss.kd_reduction != DistillConfig().loss.kd_reduction


def test_every_field_can_be_overridden(ran, tmp_path, capsys):
    """Each field has an option that reaches it; flags can be set and unset."""
    recipe = write(tmp_path, "engine: {compile: true}\nrun: {quick: true, tensorboard: true}\n")
    assert distill("--recipe", recipe, "--no-compile", "--no-quick", "--tensorboard", "None") == 0
    assert ran[0] == DistillConfig()
    assert distill("--recipe", recipe, "--compile", "--quick") == 0
    assert ran[1] == load_recipe(recipe)
    names = [field.name for section in dataclasses.fields(DistillConfig) for field in dataclasses.fields(section.type)]
    assert len(names) == len(set(names)), "options have no prefix, so names must not repeat"
    capsys.readouterr()
    assert distill("--help") == 0
    shown = capsys.readouterr().out
    assert all(f" --{name.replace('_', '-')}" in shown for name in names)


def test_without_a_recipe_images_have_their_own_defaults(ran):
    assert distill("--data", "x", "--teacher", "a", "--student", "b") == 0
    filled = fill_defaults(ran[0])
    assert (filled.optim.epochs, filled.loss.label_smoothing, filled.run.threads) == (100, 0.1, None)
    assert filled.optim.lr == pytest.approx(5e-4 * 64 / 512)
    assert filled.optim.warmup_lr == filled.optim.min_lr == pytest.approx(filled.optim.lr / 100)


@pytest.mark.parametrize("name", NAMES)
def test_printed_configuration_is_a_recipe_of_the_same_run(name, tmp_path, capsys):
    assert distill("--recipe", name, "--print-config") == 0
    printed = capsys.readouterr().out
    content = yaml.safe_load(printed)
    assert list(content) == [field.name for field in dataclasses.fields(DistillConfig)]
    original, again = load_recipe(name), load_recipe(write(tmp_path, printed))
    assert fill_defaults(with_data(again)) == fill_defaults(with_data(original))
    assert fill_defaults(with_data(again), processes=4) == fill_defaults(with_data(original), processes=4)
    assert content["optim"]["epochs"] == fill_defaults(with_data(original)).optim.epochs
    # Printing it again changes nothing.
    assert to_yaml(again) == printed


def test_printed_configuration_has_the_options_and_defaults(capsys, ran, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    line = (
        "--print-config --recipe deit-tiny --nproc 2 --teacher-layers 0 a.b --student-layers 1 2 --arms labels logits"
    )
    assert distill(*line.split(), "--device", "cuda") == 0
    printed = capsys.readouterr().out
    assert "  student_layers: [1, 2]\n  teacher_layers: [0, a.b]\n" in printed
    assert "  arms: [labels, logits]\n" in printed and "  nproc: 2\n" in printed
    assert "  lr: null  # 0.0005 with these options and 2 processes\n" in printed
    monkeypatch.setenv("WORLD_SIZE", "4")  # as torchrun does
    assert distill(*line.split(), "--device", "cuda") == 0
    assert "  lr: null  # 0.001 with these options and 4 processes\n" in capsys.readouterr().out
    assert distill("--print-config", "--epochs", 20) == 0
    content = yaml.safe_load(capsys.readouterr().out)
    assert content["data"]["dataset"] == "digits" and content["run"]["arms"] == ["labels", "logits", "spectral"]
    assert (content["optim"]["epochs"], content["optim"]["warmup_epochs"], content["optim"]["lr"]) == (20, 2, 0.005)
    assert distill("--print-config", "--epochs", 0) == 2 and "--epochs is 0" in capsys.readouterr().err
    assert not ran


def test_recipes_are_listed(capsys, ran):
    assert distill("--list-recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES) and not ran


def test_help_shows_the_values_of_the_recipe(capsys):
    assert distill("--recipe", "swin-tiny", "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(default: swin_tiny_patch4_window7_224)" in shown and "(default: 0.05)" in shown
    assert "--recipe" in shown and "--print-config" in shown


def test_wrong_recipes_and_options_end_with_a_sentence(tmp_path, capsys, ran):
    assert distill("--recipe", "diet-tiny") == 2
    assert capsys.readouterr().err == "skd: there is no recipe 'diet-tiny'; did you mean deit-tiny?\n"
    assert distill("--recipe", write(tmp_path, "optim: {epoch: 3}")) == 2
    error = capsys.readouterr().err
    assert error.startswith("skd: the recipe") and error.count("\n") == 1 and "did you mean epochs?" in error
    assert distill("--epochz", 3) == 2
    error = capsys.readouterr().err
    assert "Unrecognized options: --epochz" in error and "--epochs" in error
    assert distill("--recipe") == 2 and "--recipe" in capsys.readouterr().err
    assert distill("--recipe", "deit-tiny") == 2 and "--teacher needs --data DIR" in capsys.readouterr().err
    assert not ran


def test_the_default_run_needs_no_torch_to_be_refused():
    code = (
        "import sys; from skd.cli import main; s = main(['distill', '--alpha', '2']); "
        "sys.exit(10 * ('torch' in sys.modules) + s)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "skd: --alpha is 2.0, but must be from 0 to 1\n"


def test_nproc_starts_processes_once(monkeypatch, ran, capsys):
    launched = []

    def launch(nproc, arguments):
        launched.append((nproc, list(arguments)))
        return 3

    module = types.SimpleNamespace(launch=launch, is_launched=lambda: False)
    monkeypatch.setitem(sys.modules, "skd.distill.distributed", module)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distill("--nproc", 2, "--epochs", 3) == 3
    assert launched == [(2, ["--nproc", "2", "--epochs", "3"])] and not ran
    # What is wrong by itself is said once, before there are processes.
    assert distill("--nproc", 2, "--epochs", 0) == 2
    assert len(launched) == 1 and "--epochs is 0" in capsys.readouterr().err
    assert distill("--nproc", 1) == 0 and len(launched) == 1 and ran[0].engine.nproc == 1
    # In one of the processes it is done already.
    module.is_launched = lambda: True
    assert distill("--nproc", 2) == 0 and len(launched) == 1 and ran[1].engine.nproc == 2


# the folder of a run


def run_folder(path, config):
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(fill_defaults(config).to_dict(), sort_keys=False))
    return path


def test_a_run_is_gone_on_with_from_its_folder_alone(tmp_path, ran):
    began = DistillConfig().replace(optim={"epochs": 9}, run={"seed": 3, "arms": ("labels", "spectral")})
    folder = run_folder(tmp_path / "run", began)
    assert distill("--resume", folder) == 0
    expected = fill_defaults(began).replace(run={"resume": str(folder), "out": folder})
    assert ran[0] == config_of_run(folder) == fill_defaults(ran[0]) == expected
    # Options and recipes win, so that what differs can be shown.
    assert distill("--resume", folder, "--epochs", 10) == 0
    assert ran[1] == expected.replace(optim={"epochs": 10})
    assert distill("--resume", folder, "--recipe", "gratings") == 0
    assert ran[2] == load_recipe("gratings").replace(run={"resume": str(folder)})


def test_a_moved_run_and_one_with_layers_from_a_file(tmp_path):
    models = {"student_layers": (0, "blocks.1"), "teacher_layers": (1, 2)}
    config = fill_defaults(images(models=models, run={"out": "somewhere/else", "resume": "auto"}))
    path = run_folder(tmp_path / "moved", config)
    content = yaml.safe_load((path / "config.yaml").read_text())
    assert config_of_run(path).models.student_layers == (0, "blocks.1")
    content["models"]["layers"] = "auto"  # of which the lists came
    (path / "config.yaml").write_text(yaml.safe_dump(content))
    config = config_of_run(path)
    assert config.run.out == path and config.run.resume == str(path)
    assert config.models.student_layers is config.models.teacher_layers is None and config.models.layers == "auto"
    assert fill_defaults(config).task == "images"


def test_no_folder_of_a_run(tmp_path, capsys, ran):
    assert distill("--resume", tmp_path / "nowhere") == 2
    assert "nowhere is no folder; give the folder of a run" in capsys.readouterr().err
    assert distill("--resume", tmp_path) == 2
    assert "has no config.yaml; give the folder of a run" in capsys.readouterr().err
    assert distill("--resume", "auto", "--out", tmp_path / "new") == 0
    assert ran[0].run.resume == "auto" and ran[0].optim == DistillConfig().optim


# defaults


def test_tasks():
    assert DistillConfig().task == "digits"
    assert changed("data", "dataset", "gratings").task == "gratings"
    assert changed("data", "dataset", "torch/cifar10").task == changed("data", "data", "x").task == "images"
    assert load_recipe("deit-tiny").task == "images"


def test_quick_is_two_epochs_whatever_the_recipe_says():
    for name in NAMES:
        optim = fill_defaults(with_data(load_recipe(name).replace(run={"quick": True}))).optim
        assert (optim.epochs, optim.teacher_epochs) == (2, 2) and optim.warmup_epochs <= 1
    assert fill_defaults(DistillConfig().replace(run={"quick": True}, optim={"epochs": 1})).optim.epochs == 1


def test_default_arms_are_those_with_a_term():
    def arms(**loss):
        return fill_defaults(DistillConfig().replace(loss=loss)).run.arms

    assert arms() == ("labels", "logits", "spectral")
    assert arms(weight=0.0) == ("labels", "logits")
    assert arms(alpha=0.0) == ("labels", "spectral")
    named = DistillConfig().replace(run={"arms": ("labels",)}, loss={"alpha": 0.0, "weight": 0.0})
    assert fill_defaults(named).run.arms == ("labels",)


# what is refused

OUT_OF_RANGE = [
    *[("data", name, 0, "at least 1") for name in ("batch_size",)],
    *[("data", name, -1, "at least 0") for name in ("max_bad_images",)],
    *[("data", name, float("nan"), "at least 0") for name in ("color_jitter", "mixup", "cutmix")],
    *[("data", name, 1.5, "from 0 to 1") for name in ("random_erasing", "mixup_prob", "mixup_switch_prob")],
    *[("data", name, 0, "at least 1") for name in ("image_size", "teacher_image_size", "repeats")],
    ("data", "workers", -1, "at least 0"),
    ("data", "crop_pct", 0.0, "above 0 and at most 1"),
    ("data", "crop_pct", 1.01, "above 0 and at most 1"),
    ("models", "drop_path", 1.0, "from 0 to below 1"),
    ("models", "drop_path", -0.1, "from 0 to below 1"),
    ("loss", "alpha", 1.1, "from 0 to 1"),
    ("loss", "tau", 0.0, "above 0"),
    ("loss", "weight", float("inf"), "at least 0"),
    ("loss", "label_smoothing", 1.0, "from 0 to below 1"),
    *[("optim", name, 0, "at least 1") for name in ("epochs", "teacher_epochs", "accumulate")],
    *[("optim", name, 0.0, "above 0") for name in ("base_lr", "lr", "clip_grad")],
    ("optim", "lr", float("nan"), "above 0"),
    ("optim", "weight_decay", -1.0, "at least 0"),
    ("optim", "ema", 1.0, "from 0 to below 1"),
    ("optim", "ema", float("nan"), "from 0 to below 1"),
    ("optim", "warmup_epochs", 100, "from 0 to 99"),
    ("optim", "warmup_epochs", -1, "from 0 to 99"),
    ("optim", "warmup_lr", -1e-6, "from 0 to the peak learning rate 6.25e-05"),
    ("optim", "min_lr", 1.0, "from 0 to the peak learning rate 6.25e-05"),
    *[("engine", name, 0, "at least 1") for name in ("nproc", "max_bad_steps", "log_interval")],
    *[("run", name, 0, "at least 1") for name in ("seeds", "threads")],
    ("run", "seed", -1, "from 0 to 100000"),
    ("run", "checkpoint_minutes", 0.0, "above 0"),
]


@pytest.mark.parametrize(("section", "name", "value", "allowed"), OUT_OF_RANGE)
def test_numbers_out_of_range(section, name, value, allowed):
    with pytest.raises(DistillError) as caught:
        fill_defaults(images(**{section: {name: value}}))
    flag = f"--{name.replace('_', '-')}"
    assert str(caught.value).startswith(f"{flag} is {value:g}" if name in ("warmup_lr", "min_lr") else f"{flag} is")
    assert allowed in str(caught.value)


def test_every_number_has_a_range_and_a_test():
    numbers = {
        (section.name, field.name)
        for section in dataclasses.fields(DistillConfig)
        for field in dataclasses.fields(section.type)
        if any(kind in str(field.type) for kind in ("int", "float")) and "tuple" not in str(field.type)
        if "Literal" not in str(field.type)
    }
    ranged = {(section, name) for section, names in _RANGES.items() for name in names}
    assert numbers - ranged == {("optim", "warmup_epochs"), ("optim", "warmup_lr"), ("optim", "min_lr")}
    assert numbers == {(section, name) for section, name, *_ in OUT_OF_RANGE}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (changed("models", "teacher", "t"), "--teacher needs --data DIR with train/ and val/ in it, or --dataset NAME"),
        (changed("models", "student", "t"), "--student needs --data DIR"),
        (changed("models", "train_teacher", True), "--train-teacher needs --data DIR; the digits bring their own"),
        (changed("data", "data", "x"), "--data needs --teacher NAME"),
        (changed("data", "dataset", "hfds/a/b"), "--dataset needs --teacher NAME"),
        (images(models={"student": None}), "--data needs --student NAME"),
        (changed("data", "dataset", "torch/cifar10"), "--dataset torch/cifar10 needs --data DIR, the folder"),
        (changed("data", "dataset", "gratngs"), "--dataset gratngs is none of .*; did you mean gratings?"),
        (changed("data", "dataset", "imagenet"), "--dataset imagenet is none of .*leave --dataset out and give --data"),
        (changed("data", "dataset", "torch/"), "--dataset torch/ is none of"),
        (images(data={"data": "x", "dataset": "digits"}), "--dataset digits needs no --data x"),
        (
            images(data={"data": None, "dataset": "gratings"}),
            "--teacher needs --data DIR; the gratings bring their own",
        ),
        (images(data={"val_split": "train"}), "--train-split and --val-split are both 'train'"),
        (images(data={"mixup": 0.8, "batch_size": 7}), "--mixup and --cutmix .* even --batch-size, not 7"),
        (images(data={"cutmix": 1.0, "batch_size": 7}), "even --batch-size, not 7"),
        (images(data={"interpolation": "cubic"}), "--interpolation is cubic, but must be one of bicubic"),
        (images(data={"auto_augment": "random"}), "--auto-augment is 'random', but must begin with one of rand"),
        (changed("optim", "base_lr", 1e-3), "--base-lr needs --data DIR; the learning rate for the digits is --lr"),
        (changed("models", "student_layers", (0,)), "--student-layers and --teacher-layers go together"),
        (images(models={"student_layers": (0, 1), "teacher_layers": (0,)}), "--student-layers has 2 layers and .* 1;"),
        (images(models={"student_layers": (), "teacher_layers": ()}), "at least one"),
        (
            images(models={"student_layers": (0,), "teacher_layers": (0,), "layers": "auto"}),
            "--layers and --student-layers with --teacher-layers say the same thing twice",
        ),
        (DistillConfig().replace(loss={"alpha": 0.0, "weight": 0.0}), "leaves nothing to distil"),
        (changed("run", "arms", ()), "--arms is empty; give one or more"),
        (changed("run", "arms", ("labels", "logits", "labels")), "--arms names labels more than once"),
        (DistillConfig().replace(run={"arms": ("logits",)}, loss={"alpha": 0.0}), "--arms has logits, .*--alpha 0"),
        (DistillConfig().replace(run={"arms": ("spectral",)}, loss={"weight": 0.0}), "has spectral, .*--weight 0"),
        (changed("run", "resume", "auto"), "--resume auto needs --out DIR"),
        (changed("run", "resume", ""), "--resume is empty"),
        (DistillConfig().replace(run={"resume": "a", "dry_run": True}), "--dry-run trains nothing"),
        (changed("run", "wandb", ""), "--wandb is empty"),
        (changed("run", "device", ""), "--device is empty"),
    ],
)
def test_options_that_do_not_go_together(config, words):
    with pytest.raises(DistillError, match=words):
        fill_defaults(config)


@pytest.mark.parametrize("name", _IMAGE_OPTIONS)
def test_options_of_images_are_refused_where_there_are_none(name):
    values = {"train_split": "a", "val_split": "a", "interpolation": "bicubic", "auto_augment": "rand-m9"}
    value = values.get(name, 3)
    for dataset in (None, "digits", "gratings"):
        config = DistillConfig().replace(data={"dataset": dataset, name: value})
        with pytest.raises(DistillError, match=f"--{name.replace('_', '-')} need --data DIR"):
            fill_defaults(config)


def test_folders_and_devices_that_contradict_each_other(tmp_path):
    run = {"resume": str(tmp_path / "a"), "out": tmp_path / "b"}
    with pytest.raises(DistillError, match="goes on in that folder and --out .* is another"):
        fill_defaults(DistillConfig().replace(run=run))
    same = {"resume": str(tmp_path / "a"), "out": tmp_path / "b" / ".." / "a"}
    assert fill_defaults(DistillConfig().replace(run=same)).run.resume == run["resume"]
    one = changed("run", "device", "cuda:1")
    assert fill_defaults(one).run.device == "cuda:1"
    with pytest.raises(DistillError, match="2 processes need one each; give --device cuda"):
        fill_defaults(one, processes=2)


def test_float16_on_a_cpu_is_allowed():
    config = DistillConfig().replace(engine={"amp": "fp16"}, run={"device": "cpu"})
    assert fill_defaults(config).engine.amp == "fp16"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "needs the folder of a run, or --model NAME"),
        ({"run": "r", "model": "m"}, "--model and the run r say twice"),
        ({"run": "r", "checkpoint": "c"}, "--checkpoint and the run r say twice"),
        ({"model": "m"}, "--model needs --data DIR"),
        ({"model": "m", "data": "d", "which": "ema"}, "--which ema is about the folder of a run"),
        ({"run": "r", "batch_size": 0}, "--batch-size is 0, but must be at least 1"),
        ({"run": "r", "workers": -1}, "--workers is -1"),
        ({"run": "r", "threads": 0}, "--threads is 0"),
    ],
)
def test_evaluations_that_are_refused(fields, words):
    with pytest.raises(DistillError, match=words):
        check_eval(EvalConfig(**fields))


def test_evaluations_that_are_accepted():
    check_eval(EvalConfig(run="r", which="teacher", data="d"))
    check_eval(EvalConfig(model="m", data="d", checkpoint="c"))
