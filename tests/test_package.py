"""What is in the package besides its code, as the place shows it where packages are found."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def readme():
    """The README as the build makes it of the repository's."""
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 reads no TOML")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    hook = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    (fragment,) = hook["fragments"]
    text = (ROOT / fragment["path"]).read_text("utf-8")
    for substitution in hook["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    return text


def test_no_link_of_its_readme_leads_nowhere(readme):
    links = LINK.findall(readme)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    assert "](" in (ROOT / "README.md").read_text("utf-8")


def test_words_and_code_of_its_readme_stay(readme):
    original = (ROOT / "README.md").read_text("utf-8")
    blocks = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    assert blocks.findall(readme) == blocks.findall(original)
    assert "| play before you read | Play |" in readme
    assert [line for line in readme.splitlines() if line.startswith("#")] == [
        line for line in original.splitlines() if line.startswith("#")
    ]
