"""Every link of a document leads to a file and a heading that are there."""

import pytest

from tests.documents.pages import DOCUMENTS, anchors, links, name


def broken(path, text):
    """The links of a page that lead nowhere."""
    out = []
    for link in links(text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.is_file() or (anchor and anchor not in anchors(target.read_text())):
            out.append(link)
    return out


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path):
    assert broken(path, path.read_text()) == []


def test_the_check_finds_broken_links(tmp_path):
    (tmp_path / "b.md").write_text("# A heading, of `words`\n")
    text = "[a](b.md) [b](b.md#a-heading-of-words) [c](c.md) [d](b.md#none) ![e](e.png) [f](#none) [g](https://x.y)"
    assert broken(tmp_path / "b.md", text) == ["c.md", "b.md#none", "e.png", "#none"]
