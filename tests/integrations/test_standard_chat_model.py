"""LangChain's standard suites for chat models, on ``to_chat_model`` of a scripted LM."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_asyndbt.chat_model import DSPyChatModel
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from scripted_chat import chat_lm

# The suites hold plain tests and coroutines, and expect that coroutines run without a mark.
pytestmark = [pytest.mark.asyncio, pytest.mark.filterwarnings("ignore:The test:pytest.PytestWarning")]


class _Model:
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return DSPyChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"lm": chat_lm()}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "test/other"


# The suites' image tests download their pictures; images are tested in test_worker_lm.py instead.
class TestStandardUnit(_Model, ChatModelUnitTests):
    pass


class TestStandardIntegration(_Model, ChatModelIntegrationTests):
    @pytest.fixture
    def model(self, request: Any) -> Any:
        return DSPyChatModel(lm=chat_lm(), **self.standard_chat_model_params)
