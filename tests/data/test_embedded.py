import platform
import sys

from data.embedded import embedded_bytes, embedded_documents, embedded_name


def test_names_are_sorted_stable_and_free_of_tests():
    names = [name for name, _ in embedded_documents()]
    topics = [name for name in names if name.startswith("pydoc_data.topics:")]
    files = names[len(topics) :]
    assert topics == sorted(topics)
    assert files == sorted(files)
    assert len(set(names)) == len(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(files)
    assert "pydoc_data/topics.py" not in files
    folders = {part for name in files for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "dist-packages", "idle_test"}


def test_texts_are_the_files_texts():
    documents = dict(embedded_documents())
    import argparse

    with open(argparse.__file__, encoding="utf-8") as file:
        assert documents["argparse.py"] == file.read()
    assert 8e6 < sum(len(text) for text in documents.values()) < 20e6
    assert 8e6 < embedded_bytes() < 20e6


def test_no_path_of_the_machine_that_built_python():
    assert not [name for name, _ in embedded_documents() if "_sysconfigdata" in name]


def test_name_says_the_version():
    assert embedded_name().endswith(platform.python_version())


def test_without_pydoc_data(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    name, text = next(embedded_documents())
    assert name.endswith(".py")
    assert text
