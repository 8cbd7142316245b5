"""Templates: what a row becomes, and the sentence for a row or a template that cannot be used."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salt_jax.errors import InputError
from salt_jax.preparation.templates import Filled, NoResponse, Template, Unfit

GSM8K = Template("Question: {question}\nAnswer:", " {answer}")


@given(question=st.text(), answer=st.text().filter(str.strip))
def test_fields_stand_where_the_templates_name_them(question, answer):
    filled = GSM8K.fill({"question": question, "answer": answer, "other": 3})
    assert filled == (f"Question: {question}\nAnswer:", f" {answer}")
    assert GSM8K.fields == ("question", "answer")


def test_a_plain_document_is_its_text():
    assert Template().fill({"text": " a {b} "}) == Filled("", " a {b} ")
    assert Template().fill({"text": ""}) == Filled("", "")


def test_braces_and_the_beginning_of_a_field():
    template = Template("{{{a:.3}}}{a}", "{b}")
    assert template.fill({"a": "abcde", "b": "{x}"}) == ("{abc}abcde", "{x}")


def test_words_stand_for_values_of_any_type():
    template = Template("{h}", " {label}", {"label": {"0": "True", "c": "False"}})
    assert template.fill({"h": "x", "label": 0}).response == " True"
    assert template.fill({"h": "x", "label": "c"}).response == " False"
    with pytest.raises(Unfit, match="the `label` of this row is -1, expected one of 0, c"):
        template.fill({"h": "x", "label": -1})
    with pytest.raises(Unfit, match="the `label` of this row is None"):
        template.fill({"h": "x"})


@pytest.mark.parametrize("row", [{"qestion": "a", "answer": "b"}, {"question": 3, "answer": "b"}])
def test_a_row_without_a_field_of_text_is_unfit(row):
    said = (
        r"this row has no `question` \(nearest: qestion\), it has `qestion`, `answer`$"
        if "qestion" in row
        else "the `question` of this row is 3, expected a string$"
    )
    with pytest.raises(Unfit, match=said):
        GSM8K.fill(row)


@pytest.mark.parametrize("answer", ["", " \n"])
def test_a_prompt_needs_a_response_but_may_be_empty_itself(answer):
    with pytest.raises(NoResponse, match=r"response is empty .*`answer`"):
        GSM8K.fill({"question": "a", "answer": answer})
    assert Template("{question}", "{answer}").fill({"question": "", "answer": "b"}) == ("", "b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "Q: {question"}, r"prompt is 'Q: \{question', which cannot be read"),
        ({"prompt": "Q: }"}, "prompt is .*Single '}'"),
        ({"prompt": "Q: {}"}, "braces must hold a field's name"),
        ({"response": "{a!r}"}, "response is .*braces must hold a field's name"),
        ({"response": "{a:d}"}, "response is .*Unknown format code"),
        ({"response": "yes"}, "response is 'yes' and names no field"),
        ({"words": {"txt": {}}}, r"of the field 'txt' \(nearest: text\), the templates name text"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Template(**settings)
