"""The house: what the six scripts import, what they do at import, and whether the README tells the
truth about them."""
import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = {"render": set(), "prepare": {"render"}, "evaluate": {"render"},
           "train_sft": {"render", "evaluate"}, "train_grpo": {"render", "evaluate", "train_sft"},
           "pointcloud": {"render", "evaluate"}}
PACKAGES = {"torch", "transformers", "PIL", "numpy", "tqdm", "safetensors"}
COME_WITH_TRANSFORMERS = {"tokenizers", "huggingface_hub"}


def imports(name: str) -> dict[str, bool]:
    """Top-level packages that a script imports -> whether at its top."""
    tree, found = ast.parse((ROOT / f"{name}.py").read_text()), {}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for module in names:
            package = module.split(".")[0]
            found[package] = found.get(package, False) or node in tree.body
    return found


def test_six_scripts_and_no_other_python_at_the_top():
    assert {p.stem for p in ROOT.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports(name):
    """Ours form the DAG of the design; others are the standard library and the six packages,
    pyarrow and pillow-heif only inside what needs them, torch not at render's top."""
    found = imports(name)
    assert {m for m in found if m in SCRIPTS} <= SCRIPTS[name]
    others = {m for m in found if m not in SCRIPTS and m not in sys.stdlib_module_names}
    optional = {"prepare": {"pyarrow"}, "render": {"pillow_heif"}}.get(name, set())
    assert others <= PACKAGES | COME_WITH_TRANSFORMERS | optional
    assert not found.get("pyarrow") and not found.get("pillow_heif")
    assert name not in ("render", "prepare") or not found.get("torch")


@pytest.mark.parametrize("name", SCRIPTS)
def test_import_does_nothing_and_help_works(name, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    done = subprocess.run([sys.executable, ROOT / f"{name}.py", "--help"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stderr
    assert not list(tmp_path.iterdir())


def test_requirements_are_the_six_packages():
    lines = [line for line in (ROOT / "requirements.txt").read_text().split("\n") if line]
    packages = {"pillow" if p == "PIL" else p for p in PACKAGES}
    assert {line.split("==")[0] for line in lines} == packages
    assert all("==" in line for line in lines)


def commands(text: str) -> list[list[str]]:
    """The commands of a text's code blocks that run a script of ours, joined over continued
    lines: [path of the script, words ...]."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.S)
    blocks = "\n".join(block for language, block in blocks if language in ("", "bash", "sh"))
    blocks = blocks.replace("\\\n", " ")
    found = []
    for line in blocks.splitlines():
        words = line.split("#")[0].split()
        script = next((k for k, word in enumerate(words) if word.endswith(".py")), None)
        if script is not None and (ROOT / words[script]).is_file():
            found.append(words[script:])
    return found


def flags_of(script: str) -> set[str]:
    """The flags that a script and the scripts that it imports define."""
    text = (ROOT / script).read_text()
    for name in SCRIPTS:
        if re.search(rf"^(?:import|from) {name}\b", text, re.M):
            text += (ROOT / f"{name}.py").read_text()
    return set(re.findall(r'"(--[a-z][a-z0-9-]+)"', text))


def test_readme_names_scripts_and_flags_that_exist():
    text = (ROOT / "README.md").read_text()
    found = commands(text) + commands((ROOT / "runs" / "DATA.md").read_text())
    assert len(found) > 10
    for script, *words in found:
        given = {word.split("=")[0].replace("--no-", "--") for word in words if word[:2] == "--"}
        assert given <= flags_of(script), script
        assert all((ROOT / word[1:]).is_file() for word in words if word[0] == "@"), words
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
    """bash can read them, and the flags that they pass are flags of our scripts, of finding.sh or
    of torchrun."""
    known = {"--gpu", "--paper", "--list", "--seeds", "--samples", "--standalone",
             "--nproc-per-node"}
    for path in [*ROOT.glob("*.py"), *(ROOT / "runs").glob("*.py")]:
        known |= flags_of(path.relative_to(ROOT))
    for path in sorted((ROOT / "runs").glob("*.sh")):
        assert subprocess.run(["bash", "-n", path]).returncode == 0, path
        lines = path.read_text().splitlines()
        code = "\n".join(line.split(" #")[0] for line in lines if not line.startswith("#"))
        found = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", code))
        assert {flag.replace("--no-", "--") for flag in found} <= known, path


def test_ruff():
    """Unused and undefined names, complexity, import order, 100 columns, one statement a line."""
    done = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_findings_say_how_they_are_used():
    for words in (["--seeds"], ["--samples"], ["--seeds", "x"], ["--help"]):
        done = subprocess.run(["bash", ROOT / "runs" / "finding3.sh", *words],
                              capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("usage"), done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
