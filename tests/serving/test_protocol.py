"""Requests as JSON: whatever comes is a request or one ApiError, never anything else."""

import base64

from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision_export.serving.protocol import ApiError, ChatRequest, read_chat

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
URLS = st.sampled_from(
    ["", "data:", "data:image/png;base64,", "data:image/png,AA", "http://x", "data:image/;base64,"]
)
FILES = st.binary(max_size=60).map(lambda data: f"data:image/png;base64,{base64.b64encode(data).decode()}")
NAMES = st.sampled_from(
    ["role", "content", "type", "text", "image_url", "url", "detail", "user", "name", "assistant", "x"]
)
ANY = st.recursive(
    SCALARS | URLS | FILES | NAMES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
PARTS = st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": SCALARS})
    | st.fixed_dictionaries(
        {"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": URLS | FILES})}
    )
    | ANY,
    max_size=3,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": NAMES | SCALARS, "content": st.text(max_size=9) | PARTS}) | ANY, max_size=3
)
FIELDS = [*ChatRequest.model_fields, "tools", "n", "user", "top_k", "response_format"]


@settings(max_examples=400, deadline=None)
@given(
    data=ANY
    | st.builds(
        lambda messages, more: {"model": "m", "messages": messages} | more,
        MESSAGES,
        st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=2),
    )
)
def test_whatever_comes_is_a_request_or_one_error(data):
    refused = None
    try:
        read_chat(ChatRequest.read(data).messages)
    except ApiError as error:
        refused = error
    if refused is not None:
        assert 400 <= refused.status < 500
        message = refused.body["error"]["message"]
        assert message and "\n" not in message and len(message) < 400
