"""The house: what the six scripts import, what they do at import, and whether the README tells the truth about them."""
import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = {"render": set(), "prepare": set(), "evaluate": {"render"}, "train_sft": {"render", "evaluate"},
           "train_grpo": {"render", "evaluate", "train_sft"}, "pointcloud": {"render", "evaluate"}}
PACKAGES = {"torch", "transformers", "PIL", "numpy", "tqdm", "safetensors"}
COME_WITH_TRANSFORMERS = {"tokenizers", "huggingface_hub"}


def imports(name: str) -> dict[str, bool]:
    """Top-level packages that a script imports -> whether at its top."""
    tree, found = ast.parse((ROOT / f"{name}.py").read_text()), {}
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        for module in names:
            found[module.split(".")[0]] = found.get(module.split(".")[0], False) or node in tree.body
    return found


def test_six_scripts_and_no_other_python_at_the_top():
    assert {p.stem for p in ROOT.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports(name):
    """Ours form the DAG of the design; others are the standard library and the six packages, pyarrow only inside the
    readers that need it."""
    found = imports(name)
    assert {m for m in found if m in SCRIPTS} <= SCRIPTS[name]
    others = {m for m in found if m not in SCRIPTS and m not in sys.stdlib_module_names}
    assert others <= PACKAGES | COME_WITH_TRANSFORMERS | ({"pyarrow"} if name == "prepare" else set())
    assert not found.get("pyarrow")


@pytest.mark.parametrize("name", SCRIPTS)
def test_import_does_nothing_and_help_works(name, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "", []), done.stderr
    done = subprocess.run([sys.executable, str(ROOT / f"{name}.py"), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout.lower() and not list(tmp_path.iterdir()), done.stderr


def test_requirements_are_the_six_packages():
    lines = [line for line in (ROOT / "requirements.txt").read_text().split("\n") if line]
    assert {line.split("==")[0] for line in lines} == {"pillow" if p == "PIL" else p for p in PACKAGES}
    assert all("==" in line for line in lines)


def commands(text: str) -> list[list[str]]:
    """The commands of a text's code blocks that run one of our scripts, joined over their continued lines."""
    blocks = "\n".join(re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.S)).replace("\\\n", " ")
    lines = [line.split("#")[0].split() for line in blocks.splitlines()]
    return [line[next(i for i, w in enumerate(line) if w.endswith(".py")):] for line in lines
            if line and any(w in {f"{s}.py" for s in SCRIPTS} for w in line)]


def test_readme_names_scripts_and_flags_that_exist():
    text = (ROOT / "README.md").read_text()
    found = commands(text) + commands((ROOT / "runs" / "DATA.md").read_text())
    assert len(found) > 10
    for script, *words in found:
        source = (ROOT / script).read_text() + (ROOT / "render.py").read_text()
        for word in words:
            if word.startswith("--"):
                assert f'"{word.split("=")[0]}"' in source, f"{script} {word}"
            if word.startswith("@"):
                assert (ROOT / word[1:]).is_file(), word
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert (ROOT / path).exists(), path


def test_readme_line_counts_are_true():
    """The table of the six files says how long each is, to the nearest fifty lines."""
    text = (ROOT / "README.md").read_text()
    for name in SCRIPTS:
        said = re.search(rf"^\| `{name}\.py` \|.*\| (\d+) \|$", text, re.M)
        lines = len((ROOT / f"{name}.py").read_text().splitlines())
        assert said and abs(int(said[1]) - lines) <= 25, f"{name}.py has {lines} lines"


def test_recipes_parse():
    sys.path.insert(0, str(ROOT))
    import train_grpo
    import train_sft
    for path in sorted((ROOT / "runs").glob("*.args")):
        parse = train_grpo.parse_args if "grpo" in path.name else train_sft.parse_args
        assert vars(parse([f"@{path}"]))


def test_shell_recipes_are_valid():
    """bash can read them, and the flags that they pass are flags of our scripts, of finding.sh or of torchrun."""
    known = {"--gpu", "--seeds", "--samples", "--standalone", "--nproc-per-node"}
    known |= {flag for name in SCRIPTS for flag in re.findall(r'"(--[a-z][a-z-]+)"', (ROOT / f"{name}.py").read_text())}
    for path in sorted((ROOT / "runs").glob("*.sh")):
        assert subprocess.run(["bash", "-n", path]).returncode == 0, path
        code = "\n".join(line.split(" #")[0] for line in path.read_text().splitlines() if not line.startswith("#"))
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", code)) <= known, path


def test_findings_say_how_they_are_used():
    for words in (["--seeds"], ["--samples"], ["--seeds", "x"], ["--help"]):
        done = subprocess.run(["bash", ROOT / "runs" / "finding3.sh", *words], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("usage") and len(done.stderr.splitlines()) == 1, done.stderr
