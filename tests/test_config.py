"""The config: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from pydantic_core import PydanticUndefined

from pipeline import config as configuration
from pipeline.config import (
    BackboneConfig,
    Config,
    DatasetConfig,
    ExtractionConfig,
    FinetuneConfig,
    HeadConfig,
    TuningConfig,
)
from pipeline.config.reading import GONE
from pipeline.config.sections import PreprocessingConfig, keys_of
from pipeline.embed import baselines
from pipeline.errors import BackboneError, ConfigError, HeadError
from pipeline.evaluation import METRICS
from pipeline.heads import TABLES, resolve_all
from pipeline.stages import settings

GOOD = """
output: artifacts/x
backbones:
  - {name: resnet18}
heads: [knn]
"""

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        configuration.load(write(tmp_path, text), overrides, settings.names())
    return [caught.value.message, *caught.value.problems]


def test_eight_mistakes_are_reported_at_once_with_place_allowed_values_and_guess(tmp_path: Path) -> None:
    text = """
seeds: 1
dataset: {source: fodler, test_fraction: 1.5}
backbones:
  - {name: resnet18, weigths: random}
heads: [logistic_regresion]
baselines: [pixel]
tuning: {trials: ten, scoring: acuracy}
"""
    message, *problems = problems_of(tmp_path, text)
    assert message.endswith("config.yaml: 8 problems")
    assert problems == [
        "dataset.source: input should be 'digits', 'folder', 'manifest' or 'torchvision', got 'fodler', did you mean 'folder'?",
        "dataset.test_fraction: input should be less than 1, got 1.5",
        "backbones.0.weigths: unknown key, did you mean 'weights'?; "
        "allowed: name, weights, layers, pooling, arguments, preprocessing, views",
        "baselines: unknown baseline 'pixel', did you mean 'pixels'?; allowed: majority, shares, mean, pixels, hog",
        "heads.0.name: unknown head 'logistic_regresion', did you mean 'logistic_regression'?; allowed: "
        + ", ".join(TABLES["classification"].known)
        + ", or package.module:ATTRIBUTE",
        "tuning.trials: input should be a valid integer, got 'ten'",
        "tuning.scoring: unknown score 'acuracy', did you mean 'accuracy'?; allowed: " + ", ".join(["auto", *METRICS]),
        "seeds: unknown key, did you mean 'seed'?; allowed: " + ", ".join(configuration.Config.model_fields),
    ]


@pytest.mark.parametrize(
    ("yaml", "value"),
    [("1e-1", 0.1), ("1E-1", 0.1), ("0.25", 0.25), (".5", 0.5)],
)
def test_a_number_is_a_number(tmp_path: Path, yaml: str, value: float) -> None:
    config = configuration.load(write(tmp_path, GOOD), [f"dataset.test_fraction={yaml}"])
    assert config.dataset.test_fraction == value


def test_yaml_1_2_reads_no_as_text_and_010_as_ten(tmp_path: Path) -> None:
    text = GOOD.replace("artifacts/x", "NO") + "tuning: {trials: 010}\n"
    config = configuration.load(write(tmp_path, text))
    assert (config.output, config.tuning.trials) == (str(tmp_path / "NO"), 10)


def test_true_is_not_a_number_of_trials(tmp_path: Path) -> None:
    assert (
        problems_of(tmp_path, GOOD, "tuning.trials=true")[1]
        == "tuning.trials: input should be a valid integer, got True"
    )


def test_what_may_be_one_of_several_kinds_is_one_problem(tmp_path: Path) -> None:
    assert problems_of(tmp_path, GOOD, "extraction.workers=many")[1:] == [
        "extraction.workers: expected 'auto' or a whole number above 0, got 'many'"
    ]


def test_a_key_that_is_gone_is_told_with_what_to_do(tmp_path: Path) -> None:
    gone = ["extraction.processes=4", "tuning.device=cuda", "finetune.training.steps=20", "finetune.patience=3"]
    gone += ["finetune.class_weight=balanced", "finetune.tensorboard=true", "finetune.batch_norm=frozen"]
    assert problems_of(tmp_path, GOOD, *gone)[1:] == [
        "extraction.processes: was removed: one process uses all processors and one GPU, which extraction.device names; remove it",
        "tuning.device: was removed: heads are searched on the processor; remove it",
        "finetune.patience: was removed: the best weights are kept anyway; set finetune.steps lower",
        "finetune.class_weight: was removed: class weights are those of the head that a run starts from; set it for that head",
        "finetune.tensorboard: was removed: write finetune.watch: [tensorboard]",
        "finetune.training: was removed: move its keys into finetune",
    ]


def test_a_view_is_asked_for_by_views(tmp_path: Path) -> None:
    assert problems_of(tmp_path, GOOD, "backbones.0.view=flip")[1:] == [
        "backbones: unknown key 'view'; use views, such as views: [flip]"
    ]
    config = configuration.load(write(tmp_path, GOOD), ["backbones.0.views=[flip]"])
    assert [section.view for section in config.sections] == [None, "flip"]
    assert configuration.load(config, ["seed=1"]).sections == config.sections


def test_there_are_few_keys() -> None:
    sections = (Config, DatasetConfig, BackboneConfig, PreprocessingConfig, ExtractionConfig, HeadConfig, TuningConfig)
    assert sum(len(keys_of(section)) for section in (*sections, FinetuneConfig)) <= 70


@pytest.mark.parametrize("starts", [[], [0.1], [0, 0.5, 0.5], [0, 0.5, 0.2]])
def test_a_plan_with_holes_is_refused_before_anything_is_loaded(tmp_path: Path, starts: list[float]) -> None:
    plan = ", ".join(f"[{start}, all]" for start in starts)
    assert problems_of(tmp_path, GOOD, f"finetune.unfreeze=[{plan}]")[1:] == [
        "finetune.unfreeze: expected steps such as [[0, head], [0.2, all]], the first from 0 and each later than the one before"
    ]


def test_files_that_name_every_key_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    plain = configuration.load(write(tmp_path, GOOD))
    overrides = [f"{path}={json.dumps(default)}" for path, (default, _) in GONE.items()]
    assert configuration.load(write(tmp_path, GOOD), overrides) == plain


def test_what_is_gone_is_told_beside_what_is_wrong(tmp_path: Path) -> None:
    assert problems_of(tmp_path, GOOD, "tuning.device=cuda", "tuning.trials=0")[1:] == [
        "tuning.trials: input should be greater than or equal to 1, got 0",
        "tuning.device: was removed: heads are searched on the processor; remove it",
    ]


@pytest.mark.parametrize("value", ["all", "[]", "[head]", "[[1.5, head]]"])
def test_a_plan_to_unfreeze_is_a_list_of_pairs(tmp_path: Path, value: str) -> None:
    (problem,) = problems_of(tmp_path, GOOD, f"finetune.unfreeze={value}")[1:]
    assert problem.startswith("finetune.unfreeze")
    plan = configuration.load(write(tmp_path, GOOD), ["finetune.unfreeze=[[0, head], [0.5, all]]"]).finetune.unfreeze
    assert plan == ((0.0, "head"), (0.5, "all"))


def test_without_tables_any_name_passes_and_the_stage_tells_it(tmp_path: Path) -> None:
    config = configuration.load(write(tmp_path, GOOD.replace("knn", "knm")))
    with pytest.raises(HeadError, match="unknown head 'knm', did you mean 'knn'"):
        resolve_all(config.heads)
    with pytest.raises(BackboneError, match="unknown baseline 'hogs', did you mean 'hog'"):
        baselines.load("hogs")


def test_a_list_is_asked_for_in_the_words_of_the_file(tmp_path: Path) -> None:
    assert problems_of(tmp_path, GOOD, "heads=ridge")[1:] == ["heads: input should be a list, got 'ridge'"]


@pytest.mark.parametrize("value", ["cuda", "cuda:1", "cpu", "auto"])
def test_a_device_may_have_a_number(tmp_path: Path, value: str) -> None:
    config = configuration.load(write(tmp_path, GOOD), [f"extraction.device={value}"])
    assert config.extraction.device == value


@pytest.mark.parametrize("value", ["tpu", "cuda:", "cuda:x", "cpu:1", "mps:0"])
def test_another_device_is_refused_with_those_there_are(tmp_path: Path, value: str) -> None:
    assert problems_of(tmp_path, GOOD, f"extraction.device={value}")[1:] == [
        f"extraction.device: should be 'auto', 'cpu', 'mps', 'cuda' or a GPU by number, such as 'cuda:1', got '{value}'"
    ]


def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    (message,) = problems_of(tmp_path, GOOD + "output: b\n")
    assert message.endswith("config.yaml line 6: the key 'output' is given twice")


def test_default_weights_are_refused(tmp_path: Path) -> None:
    assert problems_of(tmp_path, GOOD, "backbones.0.weights=DEFAULT")[1] == (
        "backbones.0.weights: 'DEFAULT' may change between torchvision versions; give the exact name, such as 'IMAGENET1K_V2'"
    )


def test_a_source_names_what_it_also_needs(tmp_path: Path) -> None:
    assert problems_of(tmp_path, GOOD, "dataset.source=torchvision")[1] == (
        "dataset: source 'torchvision' also needs 'path' and 'name'"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tuning.trials", "--set 'tuning.trials': expected key.key=value, such as tuning.trials=8"),
        (
            "backbones.7.name=x",
            "--set 'backbones.7.name=x': 'backbones' is a list of 1; expected an index from 0 to 0, got '7'",
        ),
        ("output.a.b=1", None),
    ],
)
def test_a_wrong_override_is_refused(tmp_path: Path, override: str, message: str | None) -> None:
    found = problems_of(tmp_path, GOOD, override)
    if message is not None:
        assert found == [message]


def test_overrides_are_validated_like_the_file(tmp_path: Path) -> None:
    assert problems_of(tmp_path, GOOD, "tuning.tials=8")[1].startswith(
        "tuning.tials: unknown key, did you mean 'trials'?"
    )


def test_missing_file_is_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.load(Path("nowhere.yaml"))
    assert str(caught.value) == (
        "nowhere.yaml: cannot be read (No such file or directory); give an existing config file, such as configs/digits.yaml"
    )


def test_a_config_survives_being_written_and_read(tmp_path: Path) -> None:
    config = configuration.load(write(tmp_path, GOOD), ["heads=[{name: rbf_svm, space: {C: [0.1, 10]}}, knn]"])
    again = configuration.load(write(tmp_path, configuration.dump_yaml(config, tmp_path)))
    assert again == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid_and_open_with_their_command(path: Path) -> None:
    configuration.load(path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "make " in text.partition("dataset:")[0]


def test_folder_yaml_explains_every_key_and_shows_its_default() -> None:
    (path,) = (path for path in CONFIGS if path.name == "folder.yaml")
    section, shown = "", dict[str, dict[str, tuple[bool, str]]]()
    for line in path.read_text(encoding="utf-8").splitlines():
        found = re.match(r"(#? *)(?:- )?(#?) *([a-z_]+):(?: (.*?))?(?: +# .*)?$", line)
        if found:
            indent, inner, key, value = found.groups()
            section = key if len(indent) < 2 or indent == "# " else section
            shown.setdefault(section, {})[key] = ("#" in indent + inner, value or "")
    for name, fields in (("dataset", DatasetConfig), ("extraction", ExtractionConfig), ("tuning", TuningConfig),
                         ("finetune", FinetuneConfig), ("backbones", BackboneConfig), ("heads", HeadConfig)):  # fmt: skip
        for key in keys_of(fields):
            field = fields.model_fields[key]
            assert key in shown[name], f"folder.yaml does not explain {name}.{key}"
            commented, value = shown[name][key]
            if commented and field.default is not PydanticUndefined and key not in ("name", "budget", "class_weight"):
                told = (
                    configuration.load(path, [f"{name}.{key}={value}"]) if name not in ("backbones", "heads") else None
                )
                assert told is None or getattr(getattr(told, name), key) == field.default, f"{name}.{key}"
    assert Config.model_fields.keys() <= shown.keys()


def test_the_columns_of_a_manifest_are_named_with_it_alone(tmp_path: Path) -> None:
    manifest = ["dataset.source=manifest", "dataset.path=list.csv"]
    found = configuration.load(write(tmp_path, GOOD), [*manifest, "dataset.label_columns=age, years"]).dataset
    assert found.label_columns == ("age, years",)
    (_, problem) = problems_of(tmp_path, GOOD, "dataset.root=x", "dataset.label_columns=[a]")
    assert problem == "dataset: root and label_columns: only for source 'manifest', but the source is 'digits'"
    for columns, told in {
        "[a, a]": "a column is given twice: a, a",
        "[]": "expected at least one, got an empty list",
    }.items():
        assert problems_of(tmp_path, GOOD, *manifest, f"dataset.label_columns={columns}")[1:] == [
            f"dataset.label_columns: {told}"
        ]


def test_paths_of_a_manifest_in_a_config_are_seen_from_its_folder(tmp_path: Path) -> None:
    text = GOOD + "dataset: {source: manifest, path: list.csv, root: ../photos}"
    found = configuration.load(write(tmp_path, text)).dataset
    assert (found.path, found.root) == (str(tmp_path / "list.csv"), str(tmp_path.parent / "photos"))


def test_two_heads_of_one_name_are_refused(tmp_path: Path) -> None:
    assert problems_of(tmp_path, GOOD, "heads=[knn, knn]")[1] == "heads: named more than once: knn"


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("5", "got '5'"),
        ("0MB", "got '0MB'"),
        ("0.0 GB", "got '0.0 GB'"),
        ("2TB", "got '2TB'"),
        ("true", "got 'true'"),
        ("-1", "got '-1'"),
        ("null", "got None"),
    ],
)
def test_memory_is_a_size_above_nothing(tmp_path: Path, value: str, hint: str) -> None:
    assert problems_of(tmp_path, GOOD, f"tuning.memory={value}")[1:] == [
        f"tuning.memory: expected 'auto' or a size above 0 such as '2GB' or '500MB', {hint}"
    ]


def test_memory_in_bytes(tmp_path: Path) -> None:
    for value, expected in {"2GB": 2 * 10**9, "1.5 MB": 1_500_000, "auto": None}.items():
        assert configuration.load(write(tmp_path, GOOD), [f"tuning.memory={value}"]).tuning.memory_bytes == expected


@pytest.mark.parametrize("below", ["", "/out/x"])
def test_an_output_that_is_a_file_is_told_as_one(tmp_path: Path, below: str) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    (message,) = problems_of(tmp_path, GOOD, f"output={taken}{below}")
    assert message == (
        f"{tmp_path}/config.yaml: output: {taken} is a file, expected a folder or a name that is free; choose another output"
    )


@pytest.mark.parametrize("output", ["photos", "photos/results", "other/../photos/x"])
def test_an_output_among_the_images_would_be_taken_for_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "other").mkdir()
    images = ["dataset.source=folder", "dataset.path=photos"]
    (message,) = problems_of(tmp_path, GOOD, *images, f"output={output}")
    assert (
        f"output: {output} is inside the folder of images, photos, where output files would be mistaken for" in message
    )
    for fine in ("photos-results", "."):
        assert configuration.load(write(tmp_path, GOOD), [*images, f"output={fine}"]).output == fine
    (message,) = problems_of(tmp_path, GOOD, *images, "store=photos/features")
    assert "store: photos/features is inside the folder of images" in message


@pytest.mark.parametrize("output", [".", "new", "../new", "a/b/c"])
def test_an_output_that_is_not_there_yet_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert configuration.load(write(tmp_path, GOOD), [f"output={output}"]).output == output


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: &x [1]\nb: *x\n", "line 2: aliases such as *x are not supported; write the value out"),
        ("a: &x [*x]\n", "line 1: aliases such as *x are not supported; write the value out"),
        ("a: " + "[" * 1000, "cannot be read as YAML (maximum recursion depth exceeded"),
        ("seed: !!int abc\n", "cannot be read as YAML (invalid literal for int() with base 10: 'abc')"),
        ("seed: " + "9" * 5000, "cannot be read as YAML (Exceeds the limit (4300 digits)"),
        ("? [a]\n: b\n", "line 1: a key is a list or section"),
        (
            "a thesis\n",
            "is not a config, which is YAML with keys such as 'backbones:' and 'heads:'; images are given as a folder",
        ),
    ],
)
def test_malformed_yaml_is_one_line(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.load(write(tmp_path, text))
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pipe_in_place_of_a_config_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe.yaml: cannot be read \(It is not an ordinary file\)"):
        configuration.load(tmp_path / "pipe.yaml")


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("tuning.trials=1e999", "tuning.trials: input should be a valid integer, got inf"),
        ("tuning.trials=" + "9" * 400, "tuning.trials: expected at most 9,007,199,254,740,992, got a larger number"),
        ("dataset.max_failures=1e400", "dataset.max_failures: input should be a finite number, got inf"),
        ("dataset.path=a\0b", "dataset.path: holds a control character: 'a\\x00b'; remove it"),
    ],
)
def test_absurd_values_are_one_line(tmp_path: Path, override: str, found: str) -> None:
    assert problems_of(tmp_path, GOOD, override)[1:] == [found]


@pytest.mark.parametrize("value", ["photos #1", "a: b", "123", "no", "[x", "'quoted'", "*star", "1e3"])
def test_an_override_of_a_text_is_taken_as_it_is(tmp_path: Path, value: str) -> None:
    loaded = configuration.load(write(tmp_path, GOOD), [f"dataset.path={value}", f"backbones.0.name={value}"])
    assert (loaded.dataset.path, loaded.backbones[0].name) == (value, value)
    assert configuration.load(write(tmp_path, GOOD), ["dataset.path=null"]).dataset.path is None


WITH_PATHS = """
dataset: {source: folder, path: ../data/photos}
backbones: [{name: resnet18, weights: best.safetensors}, {name: resnet18, weights: IMAGENET1K_V1}]
heads: [knn]
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with configs/ and data/photos/, in which commands are run."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "data" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_path_in_a_config_is_relative_to_it_and_one_given_with_set_to_the_working_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = project / "configs" / "config.yaml"
    file.write_text(WITH_PATHS + "output: ../results", encoding="utf-8")
    config = configuration.load(Path("configs/config.yaml"))
    assert (config.output, config.dataset.path) == ("results", "data/photos")
    assert [section.weights for section in config.backbones] == ["configs/best.safetensors", "IMAGENET1K_V1"]
    assert configuration.load(Path("configs/config.yaml"), ["dataset.path=photos"]).dataset.path == "photos"

    (project / "results").mkdir()
    copy = project / "results" / "config.yaml"
    copy.write_text(configuration.dump_yaml(config, copy.parent), encoding="utf-8")
    assert "output: .\n" in copy.read_text(encoding="utf-8")
    assert configuration.load(Path("results/config.yaml")) == config
    monkeypatch.chdir(project / "data")
    assert configuration.load(Path("../results/config.yaml")).dataset.path == "photos"


def test_a_path_as_it_was_written_up_to_0_1_is_told_with_the_new_spelling(project: Path) -> None:
    (project / "artifacts" / "photos").mkdir(parents=True)
    file = project / "configs" / "config.yaml"
    file.write_text(WITH_PATHS.replace("../data", "data") + "output: artifacts/photos", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        configuration.load(Path("configs/config.yaml"))
    assert caught.value.message == "configs/config.yaml: paths in a config are relative to the folder the config is in"
    assert caught.value.problems == (
        "output: 'artifacts/photos' is relative to the working folder, expected '../artifacts/photos'",
        "dataset.path: 'data/photos' is relative to the working folder, expected '../data/photos'",
    )


@pytest.mark.parametrize(
    ("dataset", "output"),
    [
        ("{source: digits}", "artifacts/digits"),
        ("{source: folder, path: /some/where/my photos/}", "artifacts/my photos"),
        ("{source: folder, path: /}", "artifacts/images"),
        ("{source: folder, path: ~nobody-of-that-name/birds}", "artifacts/birds"),
        ("{source: manifest, path: /some/where/birds.csv}", "artifacts/birds"),
        ("{source: torchvision, name: CIFAR10, path: /data}", "artifacts/CIFAR10"),
    ],
)
def test_the_output_follows_the_name_of_the_data(dataset: str, output: str) -> None:
    text = f"dataset: {dataset}\nbackbones: [{{name: resnet18}}]\nheads: [knn]\n"
    assert configuration.parse(yaml.safe_load(text), "here").output == output
    assert configuration.parse({**yaml.safe_load(text), "output": "mine"}, "here").output == "mine"


def test_one_pooling_is_a_word_and_several_are_a_list() -> None:
    one, several = (
        BackboneConfig.model_validate({"name": "resnet18", "pooling": each}) for each in ("max", ["avg", "max"])
    )
    assert one.pooling == ("max",)
    assert one.model_dump(mode="json")["pooling"] == "max"
    assert several.model_dump(mode="json")["pooling"] == ["avg", "max"]
    assert BackboneConfig.model_validate_json(several.model_dump_json()) == several
    with pytest.raises(
        ConfigError, match=r"backbones\.0\.pooling\.0: input should be .* got 'maxx', did you mean 'max'\?"
    ):
        configuration.parse(
            {"output": "x", "backbones": [{"name": "resnet18", "pooling": "maxx"}], "heads": ["ridge"]}, "test"
        )
