"""What tools are called, how they describe themselves, and how people ask for sums."""

from __future__ import annotations

from dataclasses import dataclass

from tokasaurus.demo.corpus import chat_table

EXPRESSION_NAMES = (
    "calculator",
    "calculate",
    "calc",
    "compute",
    "evaluate",
    "math",
    "arithmetic",
    "simple_calculator",
    "calculate_expression",
    "evaluate_expression",
    "compute_sum",
    "do_math",
    "run_calculator",
)
HELD_OUT_EXPRESSION_NAMES = ("calculator_tool", "math_eval", "solve", "work_out")
"""In no training document: the evaluation offers them."""

EXPRESSION_PARAMETERS = (
    "expression",
    "expr",
    "input",
    "query",
    "formula",
    "text",
    "equation",
    "problem",
    "operation",
    "math_expression",
)
HELD_OUT_EXPRESSION_PARAMETERS = ("sum", "calculation", "value", "arithmetic_expression")

EXPRESSION_DESCRIPTIONS = (
    "A calculator.",
    "Evaluate an arithmetic expression.",
    "Evaluates a mathematical expression and returns the result.",
    "Work out a sum.",
    "Useful for when you need to answer questions about math.",
    "Calculate the result of an expression.",
    "Calculates the value of an expression, for example 2 + 2.",
    "Performs basic arithmetic.",
    "Does sums with + - * and /.",
    "A simple calculator tool.",
)

PAIRS_OF_PARAMETERS = (
    ("a", "b"),
    ("a", "b"),
    ("a", "b"),
    ("x", "y"),
    ("first", "second"),
    ("first_number", "second_number"),
    ("num1", "num2"),
    ("left", "right"),
)


@dataclass(frozen=True)
class Operation:
    """One of the four.

    Attributes:
        name: of a tool that does it.
        descriptions: of such a tool.
        signs: and words that ask for it.
        orders: sentences that ask for it.
    """

    name: str
    descriptions: tuple[str, ...]
    signs: tuple[str, ...]
    orders: tuple[str, ...]


OPERATIONS = {
    "+": Operation(
        "add",
        ("Add two numbers.", "Adds a and b.", "Add two integers together.", "The sum of two."),
        ("+", "+", "plus"),
        (
            "Add {a} and {b}.",
            "Add {a} to {b}.",
            "Please add {a} and {b}.",
            "What is the sum of {a} and {b}?",
            "What do you get if you add {a} and {b}?",
        ),
    ),
    "-": Operation(
        "subtract",
        ("Subtract two numbers.", "Subtracts b from a.", "The difference of two numbers."),
        ("-", "-", "minus"),
        (
            "Subtract {b} from {a}.",
            "Take {b} away from {a}.",
            "What is the difference between {a} and {b}?",
            "What is left if you take {b} from {a}?",
        ),
    ),
    "*": Operation(
        "multiply",
        ("Multiply two numbers.", "Multiplies a and b.", "The product of two numbers."),
        ("*", "*", "x", "times", "times", "multiplied by", "\u00d7"),
        (
            "Multiply {a} by {b}.",
            "Multiply {a} and {b}.",
            "What is the product of {a} and {b}?",
            "Please multiply {a} by {b}.",
        ),
    ),
    "/": Operation(
        "divide",
        ("Divide two numbers.", "Divides a by b.", "The quotient of two numbers."),
        ("/", "/", "divided by", "\u00f7"),
        (
            "Divide {a} by {b}.",
            "Please divide {a} by {b}.",
            "What do you get if you divide {a} by {b}?",
        ),
    ),
}

REQUESTS = (
    "What is {sum}?",
    "What is {sum}?",
    "What's {sum}?",
    "{sum}",
    "{sum} = ?",
    "{sum}=",
    "Calculate {sum}.",
    "Please calculate {sum}.",
    "Compute {sum}.",
    "How much is {sum}?",
    "Work out {sum}.",
    "Can you work out {sum}?",
    "Can you calculate {sum} for me?",
    "What does {sum} equal?",
    "Tell me what {sum} is.",
    "I need to know {sum}.",
    "Hi, what is {sum}?",
    "What is the result of {sum}?",
    "Use the calculator: {sum}",
    "Solve {sum}.",
    "Evaluate {sum}.",
)

SYSTEM_PROMPTS = (
    *chat_table.SYSTEM_PROMPTS,
    "You are a helpful assistant.",
    "You are a helpful assistant. Use the tools.",
    "You are a helpful assistant tasked with performing arithmetic on a set of inputs.",
    "You are a math tutor. Use the calculator for every sum.",
    "You have tools. Use them to answer the question.",
    "Answer the question with the tools that you have.",
    "Use the calculator tool for arithmetic.",
    "You do sums. Always use a tool.",
)

ERRORS = (
    "Error: division by zero",
    "Error: invalid syntax",
    "Error: the tool failed",
    "error",
    '{"error": "invalid expression"}',
    "Error executing tool: timeout",
)

OTHER_TOOLS = (
    ("get_weather", "Get the weather in a city.", (("city", "string"),)),
    ("get_current_weather", "The current weather.", (("location", "string"), ("unit", "string"))),
    ("search", "Search the web.", (("query", "string"),)),
    ("web_search", "Search the internet for a text.", (("query", "string"),)),
    ("get_time", "The time in a city.", (("city", "string"),)),
    ("get_current_time", "", ()),
    ("send_email", "Send an email.", (("to", "string"), ("text", "string"))),
    ("read_file", "Read a file.", (("path", "string"),)),
    ("roll_dice", "Roll dice.", (("sides", "integer"),)),
    ("get_stock_price", "The price of a stock.", (("symbol", "string"),)),
    ("translate", "Translate a text.", (("text", "string"), ("language", "string"))),
    ("book_flight", "Book a flight.", (("from", "string"), ("to", "string"))),
    ("set_alarm", "Set an alarm.", (("time", "string"),)),
    ("get_user_name", "The name of the user.", ()),
    ("play_music", "Play a song.", (("song", "string"),)),
    ("lookup_word", "Look a word up.", (("word", "string"),)),
)
