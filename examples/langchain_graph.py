"""A DSPy program as a node of a LangGraph graph, beside a LangChain chain, on one local LM.

python examples/langchain_graph.py
"""

from __future__ import annotations

from typing import Literal, TypedDict

import dspy
from langchain_asyndbt import to_chat_model, to_runnable
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langgraph.graph import END, START, StateGraph

from asyndbt_dspy import local_lm

MESSAGES = [
    "I was charged twice for August. Please send one of the two payments back.",
    "Does the outdoor camera work below freezing?",
]


class Triage(dspy.Signature):
    """Say who answers the customer's message: an agent for money and orders, the assistant for questions."""

    message: str = dspy.InputField()
    goes_to: Literal["agent", "assistant"] = dspy.OutputField()


class State(TypedDict, total=False):
    message: str
    goes_to: str
    reply: str


DEMOS = [
    dspy.Example(message="You sent the wrong parcel, I want my money back.", goes_to="agent"),
    dspy.Example(message="How do I pair the lamp with my phone?", goes_to="assistant"),
    dspy.Example(message="Cancel my order, please.", goes_to="agent"),
    dspy.Example(message="Can the lamp be used outdoors?", goes_to="assistant"),
]


def build(lm: dspy.LM) -> StateGraph:
    # Any program will do: one from `load_artifact`, say. This one has its demos from a person.
    program = dspy.Predict(Triage)
    program.demos = DEMOS
    triage = to_runnable(program, lm=lm, adapter=dspy.JSONAdapter(), name="triage")
    prompt = ChatPromptTemplate(
        [("system", "Answer the customer in one short sentence."), ("human", "{message}")]
    )
    reply = prompt | to_chat_model(lm, max_tokens=30) | StrOutputParser()

    graph = StateGraph(State)
    graph.add_node("triage", triage)  # reads the inputs that it knows, and writes its outputs into the state
    graph.add_node("assistant", lambda state, config: {"reply": reply.invoke(state, config)})
    graph.add_node("agent", lambda state: {"reply": "An agent will write to you today."})
    graph.add_edge(START, "triage")
    graph.add_conditional_edges("triage", lambda state: state["goes_to"], ["agent", "assistant"])
    graph.add_edge("agent", END)
    graph.add_edge("assistant", END)
    return graph


def main() -> None:
    lm = local_lm("smollm2-135m")
    app = build(lm).compile()
    for message in MESSAGES:
        found = app.invoke({"message": message})
        print(f"{message}\n  -> {found['goes_to']}: {found['reply']}\n")
    lm.engine.close()


if __name__ == "__main__":
    main()
