"""gpt-oss: reasoning is on the channel "analysis" of the harmony format."""

from octavo.text.tools.openai import Harmony


class HarmonyReasoning(Harmony):
    """Parser of reasoning and text for requests without tools."""

    with_calls = False
