"""reward.py: the spellings it accepts and refuses, properties of the reward, the data it reads, the errors it names, toy."""

import itertools
import json
import random
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import (
    TASKS,
    TOY_SIZES,
    TOY_STEPS,
    TOY_THINGS,
    InputError,
    Problem,
    extract_answer,
    load_problems,
    make_prompt,
    make_target,
    read_options,
    score,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}")
OPTIONS = "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these"


# ---- spellings: one table for numbers, one for markers, one for letters ----------------------------------------------

# (what stands after the marker, gold, reward, why)
NUMBERS = [
    ("$18M", "18", 0.0, "a letter that scales"),
    ("1.8 million", "1800000", 1.0, "a word that scales"),
    ("18 K per year.", "18", 0.0, "another, and words behind it"),
    ("$18 m", "18", 0.0, "millions, after a currency"),
    ("18 m", "18", 1.0, "metres"),
    ("1/3", "0.33", 1.0, "what the gold is a rounding of"),
    ("14.2857", "14.3", 1.0, "the same in decimals"),
    ("0.667", "0.7", 1.0, "two decimals more than the gold"),
    ("0.46", "0.5", 0.1, "one decimal more is a number of its own"),
    # plain numbers
    ("18", "18", 1.0, "an integer"),
    ("17", "18", 0.1, "another integer"),
    ("0", "0", 1.0, "zero"),
    ("-0", "0", 1.0, "minus zero is zero"),
    ("007", "7", 1.0, "leading zeros do not change an integer"),
    ("18.0", "18", 1.0, "an integer with decimals"),
    ("18", "18.0", 1.0, "ReFT's golds are floats as text"),
    ("0.5", "0.5", 1.0, "a decimal"),
    (".5", "0.5", 1.0, "a decimal without its zero"),
    ("18.", "18", 1.0, "the full stop of the sentence"),
    ("18.5.", "18.5", 1.0, "a decimal and the full stop"),
    ("18...", "18", 1.0, "an ellipsis"),
    ("18!", "18", 1.0, "an exclamation mark"),
    ("18,", "18", 1.0, "a trailing comma"),
    ("18;", "18", 1.0, "a trailing semicolon"),
    ("  18  ", "18", 1.0, "spaces around"),
    ("\t18", "18", 1.0, "a tab"),
    ("9007199254740993", "9007199254740993", 1.0, "beyond 2^53"),
    ("9007199254740992", "9007199254740993", 0.1, "a neighbour beyond 2^53, equal as floats"),
    ("1" + "0" * 400, "1" + "0" * 400, 1.0, "400 digits, no float holds them"),
    # signs
    ("-5", "-5", 1.0, "minus"),
    ("\u22125", "-5", 1.0, "the minus sign U+2212"),
    ("\u20135", "-5", 1.0, "an en dash, as in MathQA's options"),
    ("- 5", "-5", 1.0, "minus and a space, as in MathQA's options"),
    ("+5", "5", 1.0, "plus"),
    ("5", "-5", 0.1, "the sign counts"),
    ("-$5", "-5", 1.0, "minus before the currency"),
    ("$-5", "-5", 1.0, "minus after the currency"),
    ("--5", "5", 0.0, "two signs"),
    ("+-5", "-5", 0.0, "two signs"),
    ("±5", "5", 0.0, "two values"),
    # thousands
    ("70,000", "70000", 1.0, "one group"),
    ("1,080", "1,080", 1.0, "GSM8K's golds have commas"),
    ("109,200,001", "109,200,000", 0.1, "no tolerance for integers"),
    ("1,234,567.89", "1234567.89", 1.0, "groups and decimals"),
    ("1{,}080", "1080", 1.0, "LaTeX's comma"),
    ("1\\,080", "1080", 1.0, "LaTeX's thin space"),
    ("1\u2009080", "1080", 1.0, "a thin space"),
    ("1\u202f080", "1080", 1.0, "a narrow no-break space"),
    ("1 080", "1080", 0.0, "a plain space parts two numbers"),
    ("7,00", "700", 0.0, "no group of three"),
    ("7,0000", "70000", 0.0, "no group of three"),
    ("1,00,000", "100000", 0.0, "groups of two"),
    ("0,123", "123", 0.0, "a decimal comma or a group, nobody knows"),
    ("1,234,56", "1234.56", 0.0, "a broken last group"),
    ("1.234,56", "1234.56", 0.0, "points and commas exchanged"),
    ("1,080\u2009000", "1080000", 0.0, "two kinds of separators"),
    ("18\\,20", "1820", 0.0, "LaTeX's thin space between two numbers"),
    ("1'080", "1080", 0.0, "an apostrophe"),
    ("1_080", "1080", 0.0, "an underscore"),
    # currency, percent, units
    ("$18", "18", 1.0, "dollars"),
    ("\\$18", "18", 1.0, "escaped dollars"),
    ("$29.00", "29", 1.0, "dollars and cents"),
    ("€18", "18", 1.0, "euros"),
    ("18 €", "18", 1.0, "euros behind"),
    ("US$18", "18", 1.0, "US dollars"),
    ("USD 18", "18", 1.0, "a currency code"),
    ("rs . 400", "400", 1.0, "rupees, as in MathQA"),
    ("Rs. 400", "400", 1.0, "rupees"),
    ("5%", "5", 1.0, "percent"),
    ("5 \\%", "5", 1.0, "escaped percent"),
    ("5 percent", "5", 1.0, "percent as a word"),
    ("5%", "0.05", 0.1, "no factor of a hundred"),
    ("500", "5", 0.1, "no factor of a hundred"),
    ("18 dollars", "18", 1.0, "a unit"),
    ("18 red apples in the bag", "18", 1.0, "several words"),
    ("$18 per day", "18", 1.0, "a rate"),
    ("$18/hour", "18", 1.0, "a rate with a stroke"),
    ("$18 / hour", "18", 1.0, "and spaces around it"),
    ("18 / 2 apples", "18", 0.1, "a division"),
    ("18\\degree", "18", 1.0, "LaTeX's degree"),
    ("60 km / hr", "60", 1.0, "a rate with spaces, as in MathQA"),
    ("60km/h", "60", 1.0, "an attached unit"),
    ("18 cm2", "18", 1.0, "a square unit, plain"),
    ("18 cm^2", "18", 1.0, "a square unit"),
    ("18 cm\u00b2", "18", 1.0, "a square unit, superscript"),
    ("462 cm \u00b2", "462", 1.0, "a square unit, as in MathQA"),
    ("18 \u00b2", "18", 0.0, "a superscript"),
    ("18 sq. ft.", "18", 1.0, "abbreviated units"),
    ("45\u00b0", "45", 1.0, "degrees"),
    ("45^\\circ", "45", 1.0, "degrees in LaTeX"),
    ("98.6 \u00b0F", "98.6", 1.0, "degrees Fahrenheit"),
    ("18 co-workers' desks", "18", 1.0, "a hyphen and an apostrophe in words"),
    ("1.8 billion", "1800000000", 1.0, "a scale word"),
    ("1.8 billion", "1.8", 0.1, "the scale word counts"),
    ("5 thousand", "5", 0.1, "the scale word counts"),
    ("5 hundred thousand", "500", 0.0, "two scale words"),
    ("18k", "18", 0.0, "k may be thousand"),
    ("$18 mil", "18", 0.0, "mil may be million"),
    ("18 millions", "18", 0.1, "as the singular"),
    ("18 millions", "18000000", 1.0, "as the singular"),
    ("18 lakhs", "1800000", 1.0, "a hundred thousand"),
    ("2.5 crore", "25000000", 1.0, "ten million"),
    ("18 k", "18", 0.0, "k may be thousand"),
    ("18x", "18", 0.0, "algebra"),
    ("18*m", "18", 0.0, "algebra"),
    ("18 x", "18", 0.0, "algebra"),
    ("4 \u03c0", "4", 0.0, "a multiple of pi"),
    ("18th", "18", 0.0, "an ordinal"),
    ("18apples", "18", 0.0, "no token of the grammar"),
    # fractions
    ("1/2", "0.5", 1.0, "a fraction"),
    ("31 / 36", "31/36", 1.0, "a fraction with spaces, as in MathQA"),
    ("36/2", "18", 1.0, "a fraction that is an integer"),
    ("-1/2", "-0.5", 1.0, "a negative fraction"),
    ("1\u20442", "0.5", 1.0, "the fraction slash U+2044"),
    ("½", "0.5", 1.0, "one character"),
    ("2½", "2.5", 1.0, "a mixed number with one character"),
    ("2¼", "2.25", 1.0, "a quarter"),
    ("2¾", "2.75", 1.0, "three quarters"),
    ("2⅓", "7/3", 1.0, "a third"),
    ("2⅔", "8/3", 1.0, "two thirds"),
    ("½5", "0.04", 0.0, "a digit after the fraction"),
    ("\\frac{1}{2}", "0.5", 1.0, "LaTeX"),
    ("\\dfrac{3}{4}", "0.75", 1.0, "LaTeX, display size"),
    ("\\frac12", "0.5", 1.0, "LaTeX without braces"),
    ("-\\frac{1}{2}", "-0.5", 1.0, "LaTeX, negative"),
    ("2\\frac{1}{2}", "2.5", 1.0, "LaTeX, mixed"),
    ("2 2/3", "8/3", 1.0, "a mixed number"),
    ("2 2/3", "2", 0.1, "the fraction counts"),
    ("134 1 / 3 %", "134.3333333", 1.0, "a mixed number, as in MathQA"),
    ("-3 1/2", "-3.5", 1.0, "the sign is that of the whole"),
    ("3/4 cup", "0.75", 1.0, "a fraction and a unit"),
    ("2 3/3", "3", 0.0, "no mixed number: the fraction is 1"),
    ("4 10/3", "10", 0.0, "no mixed number: the fraction exceeds 1"),
    ("1/2/3", "1", 0.0, "two strokes"),
    ("1/0", "0", 0.0, "division by zero"),
    ("0/0", "0", 0.0, "division by zero"),
    ("\\frac{1}{2}5", "0.04", 0.0, "a digit after the fraction does not join its denominator"),
    ("\\frac{x}{2}", "2", 0.0, "no number in it"),
    ("2 and 1/2", "2", 0.0, "two numbers"),
    ("3-1/2", "3", 0.0, "a difference or a mixed number, nobody knows"),
    # powers of ten
    ("1e3", "1000", 1.0, "e notation"),
    ("1.5E-3", "0.0015", 1.0, "E notation"),
    ("1.5 x 10^6", "1500000", 1.0, "times ten to the"),
    ("1.5 \u00d7 10^{6}", "1500000", 1.0, "the times sign, braces"),
    ("1.5 \\times 10^{-3}", "0.0015", 1.0, "LaTeX"),
    ("1.5 \\cdot 10^6", "1500000", 1.0, "LaTeX's dot"),
    ("1.5*10^6", "1500000", 1.0, "an asterisk"),
    ("1e3", "1", 0.1, "not the 1 before the e"),
    ("1e", "1", 0.0, "half of the notation"),
    ("1e99999", "1", 0.0, "an exponent of five digits"),
    ("1.5 x 10^{6}5", "1.5", 0.0, "a digit after the power does not join the exponent"),
    ("2^3", "2", 0.0, "another power"),
    ("2**3", "2", 0.0, "another power"),
    ("10\u00b2", "10", 0.0, "a superscript"),
    # wrapping
    ("<18>", "18", 1.0, "ReFT's brackets"),
    ("<18>.", "18", 1.0, "ReFT's brackets and the full stop"),
    ("<28%>.", "28", 1.0, "ReFT's brackets with percent"),
    ("<18", "18", 0.0, "an inequality"),
    ("> 18", "18", 0.0, "an inequality"),
    ("(18)", "18", 1.0, "parentheses"),
    ("**18**", "18", 1.0, "bold"),
    ("**$18** per day", "18", 1.0, "bold, then a unit"),
    ("*18*", "18", 1.0, "italic"),
    ("`18`", "18", 1.0, "code"),
    ('"18"', "18", 1.0, "quotes"),
    ("\u201c18\u201d", "18", 1.0, "typographic quotes"),
    ("$18$", "18", 1.0, "TeX"),
    ("$$18$$", "18", 1.0, "TeX, display"),
    ("$\\$18$", "18", 1.0, "TeX with dollars"),
    ("\\(18\\)", "18", 1.0, "LaTeX"),
    ("\\[ 18 \\]", "18", 1.0, "LaTeX, display"),
    ("\\text{18}", "18", 1.0, "LaTeX's text"),
    ("\\mathbf{18}", "18", 1.0, "LaTeX's bold"),
    ("18\\text{ apples}", "18", 1.0, "a unit in LaTeX's text"),
    ("18^", "18", 0.0, "a character of no rule"),
    ("18~", "18", 1.0, "TeX's space"),
    # equations
    ("x = 18", "18", 1.0, "a named value"),
    ("= 18", "18", 1.0, "an equals sign"),
    ("20 - 2 = 18", "18", 1.0, "the value, not the first number"),
    ("20 - 2 = 18", "20", 0.1, "the value, not the first number"),
    ("5 apples + 3 apples = 8 apples", "8", 1.0, "units in the sum"),
    ("$5 \\times 3 = 15$", "15", 1.0, "LaTeX"),
    ("3 * 6 = 9 + 9 = 18", "18", 1.0, "a chain"),
    ("1/2 = 0.5", "0.5", 1.0, "a fraction and its value"),
    ("20 - 2 = 18, because 2 + 3 = 5", "18", 1.0, "a later equation explains"),
    ("18 because 20 - 2 = 18", "18", 1.0, "the explanation has numbers"),
    ("18, because half of 40 = 20", "20", 0.1, "a value in an explanation is no answer"),
    ("18 \u2014 that is 20 - 2", "18", 1.0, "an explanation behind a dash"),
    ("18 (20 - 2 = 18)", "18", 1.0, "an explanation in parentheses"),
    ("\u2248 18", "18", 1.0, "nearly equal"),
    ("\\approx 18", "18", 1.0, "nearly equal in LaTeX"),
    ("approximately 18", "18", 1.0, "nearly equal in words"),
    ("x >= 18", "18", 0.0, "an inequality"),
    ("x != 18", "18", 0.0, "an inequality"),
    ("18 != 20", "18", 0.0, "an inequality"),
    ("x \\le 18", "18", 0.0, "an inequality in LaTeX"),
    ("5 = 2 + 3", "5", 0.0, "no value after the equals sign"),
    # more than one number
    ("18 or 20", "18", 0.0, "two answers"),
    ("18, or 20", "18", 0.0, "two answers"),
    ("18, or so", "18", 0.0, "two answers, one unsaid"),
    ("18 or so", "18", 0.0, "two answers, one unsaid"),
    ("18 and 20", "18", 0.0, "two answers"),
    ("3, 4", "34", 0.0, "a list is not one number"),
    ("3, 4", "3", 0.0, "nor its first member"),
    ("18, $20", "18", 0.0, "a list with currency"),
    ("18; 20", "18", 0.0, "a list"),
    ("1 2", "12", 0.0, "two numbers"),
    ("18-20", "18", 0.0, "a range"),
    ("18 to 20", "18", 0.0, "a range"),
    ("18 + 2", "18", 0.0, "a sum without its value"),
    ("5*3", "5", 0.0, "a product without its value"),
    ("2(x + 1)", "2", 0.0, "a product"),
    ("2 (3)", "2", 0.0, "a product without its value"),
    ("10+John's age", "10", 0.0, "a sum"),
    ("4 : 1", "4", 0.0, "a ratio"),
    ("3:30", "3", 0.0, "a time"),
    ("12 p . m .", "12", 0.0, "a time, as in MathQA"),
    ("18 out of 20", "18", 0.0, "a share"),
    ("5 feet 3 inches", "5", 0.0, "two units"),
    ("2 hours and 20 minutes", "2", 0.0, "two units"),
    ("18 and a half", "18", 0.0, "a mixed number in words"),
    ("18. 5", "18", 0.0, "broken decimals"),
    ("8 . 2 %", "8", 0.0, "broken decimals, as in MathQA"),
    ("18...5", "18", 0.0, "broken decimals"),
    ("1.2.3", "1.2", 0.0, "two points"),
    ("18 apples and 5 oranges", "18", 0.0, "two answers with units"),
    ("18. I hope this helps!", "18", 1.0, "another sentence"),
    ("18, and that is all", "18", 1.0, "a clause without numbers"),
    ("18 miles in 2 hours", "18", 1.0, "the first number, with its circumstances"),
    # no numbers
    ("", "18", 0.0, "nothing"),
    ("not 18", "18", 0.0, "a denial"),
    ("eighteen", "18", 0.0, "a word"),
    ("unknown", "18", 0.0, "a word"),
    ("None", "0", 0.0, "no number"),
    ("nan", "nan", 0.0, "no number, as gold neither"),
    ("inf", "inf", 0.0, "no number, as gold neither"),
    ("-Infinity", "0", 0.0, "no number"),
    ("True", "1", 0.0, "no number"),
    ("0x12", "18", 0.0, "hexadecimal"),
    ("0x12", "0", 0.0, "nor its first digit"),
    ("1j", "1", 0.0, "complex"),
    ("\uff11\uff18", "18", 0.0, "full-width digits"),
    ("\u0661\u0668", "18", 0.0, "Arabic digits"),
    ("\u221a324", "18", 0.0, "a root"),
    ("|18|", "18", 0.0, "an absolute value"),
    ("__import__('os').getpid()", "18", 0.0, "code is not run"),
    ("9**9**9", "9", 0.0, "code is not run"),
    # tolerance
    ("0.33", "0.3333333333333333", 1.0, "near a gold that is no integer"),
    ("1/3", "0.3333333333333333", 1.0, "the fraction that gold rounds"),
    ("3.3", "3.3333333", 1.0, "gold rounded to one decimal"),
    ("3.4", "3.3333333", 0.1, "not gold rounded"),
    ("0.17", "0.165", 1.0, "a tie may be rounded up"),
    ("0.16", "0.165", 1.0, "or to the even digit"),
    ("0.04", "0.036", 1.0, "gold rounded to two decimals"),
    ("0.03", "0.036", 0.1, "0.01 off is much for a small gold"),
    ("0.045", "0.036", 0.1, "0.01 off is much for a small gold"),
    ("0", "0.001", 0.1, "zero is no rounding"),
    ("0.00", "0.001", 0.1, "nor with decimals"),
    ("9", "8.9333333", 0.1, "an integer is no rounding"),
    ("0", "0.4", 0.1, "an integer is no rounding"),
    ("1234.5", "1234.567", 0.1, "0.067 off, and not rounded right"),
    ("1234.56", "1234.567", 1.0, "within 0.01"),
    ("1.5e1", "14.6", 0.1, "e notation shows no decimals here"),
    ("18.001", "18", 0.1, "no tolerance for integers"),
    ("17.9999999", "18", 0.1, "no tolerance for integers"),
    ("33.33 %", "33.3333", 1.0, "with a unit"),
]

REFT_LINE = "\nTherefore, the answer is: "
# (completion, gold, reward, why)
MARKERS = [
    ("So she has 18.\nTherefore, the answer is: 18", "18", 1.0, "ReFT's line"),
    ("So she has 18. Therefore, the answer is: 18", "18", 1.0, "not on its own line"),
    ("THEREFORE, THE ANSWER IS: 18", "18", 1.0, "upper case"),
    ("Therefore the answer is 18", "18", 1.0, "no comma, no colon"),
    ("therefore,the answer is:18", "18", 1.0, "no spaces"),
    ("The answer is : 18", "18", 1.0, "a space before the colon"),
    ("The answer is:\n18", "18", 1.0, "a line break"),
    ("The answer is\r\n18\r\n", "18", 1.0, "line breaks of Windows"),
    ("**The answer is:** 18", "18", 1.0, "bold marker"),
    ("**The answer is:**\n18", "18", 1.0, "bold marker, a line break"),
    ("The final answer is 18", "18", 1.0, "final"),
    ("The correct answer is 18", "18", 1.0, "correct"),
    ("The answer is 18\nI checked it: 20 - 2.", "18", 1.0, "another line follows"),
    ("The answer is:\n\n18", "18", 0.0, "an empty line starts another paragraph"),
    ("The answer is 18\nThe answer is 20", "18", 0.1, "the last marker wins"),
    ("The answer is 20\nThe answer is 18", "18", 1.0, "the last marker wins"),
    ("The answer is 18. The answer is unknown.", "18", 0.0, "the last marker wins, no fallback"),
    ("The answer is not 18", "18", 0.0, "a denial"),
    ("The answer is 18. The answer isn't 20", "18", 1.0, "isn't is no marker"),
    ("My answer is 18", "18", 0.0, "no marker"),
    ("Answer: 18", "18", 0.0, "no marker"),
    ("18", "18", 0.0, "no marker: no fallback to the last number"),
    ("", "18", 0.0, "an empty completion"),
    ("The answer", "18", 0.0, "half a marker"),
    ("#### 18", "18", 1.0, "GSM8K"),
    ("####18", "18", 1.0, "GSM8K without space"),
    ("20 - 2 = 18 #### 18", "18", 1.0, "GSM8K in a line"),
    ("####\n18", "18", 1.0, "GSM8K with a line break"),
    ("#### -1,080", "-1080", 1.0, "GSM8K's commas and signs"),
    ("#### 18\n#### 20", "18", 0.1, "the last marker wins"),
    ("#### 42 " + "and so on " * 40, "42", 1.0, "no window of 300 characters"),
    ("### 18", "18", 0.0, "a heading"),
    ("A: 18", "18", 1.0, "a line that starts with A:"),
    ("Q: how many?\nA:18", "18", 1.0, "a later line"),
    ("Q: how many? A: 18", "18", 0.0, "not at the start of a line"),
    ("a: 18", "18", 0.0, "lower case is an option or an item"),
    ("\\boxed{18}", "18", 1.0, "a box"),
    ("So it is $\\boxed{18}$.", "18", 1.0, "a box in a sentence"),
    ("The answer is \\boxed{18} apples", "18", 1.0, "two markers, one answer"),
    ("\\boxed{\\frac{1}{2}}", "0.5", 1.0, "braces in braces"),
    ("\\boxed{\\text{\\textbf{18}}}", "18", 1.0, "commands in commands"),
    ("\\boxed{18\\text{ apples}}", "18", 1.0, "a unit in the box"),
    ("\\boxed{18} and \\boxed{20}", "18", 0.1, "the last box wins"),
    ("\\boxed{18} then the answer is: 20", "18", 0.1, "the last marker wins"),
    ("The answer is 20, no, \\boxed{18}", "18", 1.0, "the last marker wins"),
    ("\\boxed{18} or \\boxed{20", "18", 1.0, "a box that stays open is no marker"),
    ("\\boxed{\\boxed{18}}", "18", 1.0, "a box in a box"),
    ("\\boxed{18", "18", 0.0, "an open box"),
    (r"\boxed{1,\!080}", "1080", 1.0, "a negative thin space"),
    (r"\boxed{1\;080}", "1080", 1.0, "a thick space parts thousands"),
    (r"\boxed{1~080}", "1080", 1.0, "so does a tie"),
    (r"\boxed {\dfrac { 3 } {4} }", "3/4", 1.0, "spaces before and in braces"),
    (r"\fbox{18}", "18", 1.0, "a framed box"),
    ("\\boxed{\n18\n}", "18", 1.0, "line breaks in a box"),
    ("\\boxed{18\n\n}", "18", 0.0, "a box ends in its paragraph"),
    ("\\boxed{}", "18", 0.0, "an empty box"),
    ("\\boxed{18, 20}", "18", 0.0, "a list in a box"),
    ("\\boxed{The answer is 18}", "18", 1.0, "a marker in a box"),
    ("\ufeffThe answer is 18", "18", 1.0, "a byte order mark"),
    ("\u0130\u0130\u0130 The answer is 18", "18", 1.0, "letters whose lower case is longer"),
    ("\ud800 The answer is 18", "18", 1.0, "a lone surrogate"),
    ("The answer is " + " " * 2000 + "18", "18", 1.0, "spaces before the number"),
    ("The answer is " + "9" * 5000, "18", 0.0, "more digits than int() takes"),
    ("The answer is " + "0" * 2000 + "18", "18", 0.0, "more digits than are read"),
    ("The answer is " + "x" * 992 + "=18" + "0" * 10, "18", 0.0, "a number that the cut divides"),
]

LIST = "['a ) 1 / 2', 'b ) 4 : 1', 'c ) rs . 1,250', 'd ) d ) 12 %', 'e ) 12']"
TWINS = "a ) 38 , b ) 38 , c ) 30 , d ) none , e ) none"
# (what stands after the marker, options, gold, reward, why)
LETTERS = [
    ("(a) (b)", OPTIONS, "a", 0.0, "two letters"),
    ("A; B", OPTIONS, "a", 0.0, "two letters"),
    ("a. b", OPTIONS, "a", 0.0, "two letters"),
    ("d) b", OPTIONS, "d", 0.0, "two letters"),
    ("a) b)", OPTIONS, "a", 0.0, "two letters, half in brackets"),
    ("(a) (a)", OPTIONS, "a", 1.0, "one letter, twice"),
    ("A - 38", OPTIONS, "a", 1.0, "a letter and the text of its option"),
    ("B - 38", OPTIONS, "b", 0.0, "a letter and the text of another"),
    ("a", OPTIONS, "a", 1.0, "a letter"),
    ("A", OPTIONS, "a", 1.0, "upper case"),
    ("a", OPTIONS, "A", 1.0, "upper case as gold"),
    ("b", OPTIONS, "a", 0.1, "another letter"),
    ("a.", OPTIONS, "a", 1.0, "the full stop"),
    ("(a)", OPTIONS, "a", 1.0, "parentheses"),
    ("(A).", OPTIONS, "a", 1.0, "parentheses, full stop"),
    ("a)", OPTIONS, "a", 1.0, "one parenthesis"),
    ("[a]", OPTIONS, "a", 1.0, "brackets"),
    ("<a>.", OPTIONS, "a", 1.0, "ReFT's brackets"),
    ("**a**", OPTIONS, "a", 1.0, "bold"),
    ("$a$", OPTIONS, "a", 1.0, "TeX"),
    ('"a"', OPTIONS, "a", 1.0, "quotes"),
    ("\\text{(C)}", OPTIONS, "c", 1.0, "LaTeX"),
    ("\\textbf{(C)} 30", OPTIONS, "c", 1.0, "LaTeX and the option"),
    ("option a", OPTIONS, "a", 1.0, "option"),
    ("Option (a).", OPTIONS, "a", 1.0, "option in parentheses"),
    ("choice c", OPTIONS, "c", 1.0, "choice"),
    ("a ) 38", OPTIONS, "a", 1.0, "MathQA's form of an option"),
    ("a: 38", OPTIONS, "a", 1.0, "a colon"),
    ("a. 38", OPTIONS, "a", 1.0, "a full stop"),
    ("b ( 27.675 )", OPTIONS, "b", 1.0, "the option in parentheses"),
    ("c, since 3 * 10 = 30", OPTIONS, "c", 1.0, "an explanation"),
    ("c because 38 is too much", OPTIONS, "c", 1.0, "an explanation"),
    ("f", OPTIONS, "a", 0.0, "no option"),
    ("a or b", OPTIONS, "a", 0.0, "two letters"),
    ("(a) or (b)", OPTIONS, "a", 0.0, "two letters"),
    ("a, b", OPTIONS, "a", 0.0, "a list"),
    ("a and c", OPTIONS, "a", 0.0, "two letters"),
    ("a/b", OPTIONS, "a", 0.0, "two letters"),
    ("a ) 38 , b ) 27.675 , c ) 30", OPTIONS, "a", 0.0, "all options"),
    ("ab", OPTIONS, "a", 0.0, "no whole token"),
    ("apple", OPTIONS, "a", 0.0, "the first letter of a word"),
    ("a dog", OPTIONS, "a", 0.0, "the article"),
    ("a 38", OPTIONS, "a", 0.0, "the article"),
    ("e.g. 38", OPTIONS, "e", 0.0, "an abbreviation"),
    ("a.m.", OPTIONS, "a", 0.0, "an abbreviation"),
    ("a - 4500", OPTIONS, "a", 0.0, "algebra"),
    ("", OPTIONS, "a", 0.0, "nothing"),
    ("whatever", OPTIONS, "a", 0.0, "a word"),
    ("38", OPTIONS, "a", 1.0, "the text of one option"),
    ("38.0 apples", OPTIONS, "a", 1.0, "the value of one option"),
    ("20 + 18 = 38", OPTIONS, "a", 1.0, "the value of one option"),
    ("27.68", OPTIONS, "b", 0.0, "no tolerance between options"),
    ("Data inadequate.", OPTIONS, "d", 1.0, "the text of one option"),
    ("none of these", OPTIONS, "e", 1.0, "the text of one option"),
    ("none", OPTIONS, "e", 0.0, "a part of a text"),
    ("39", OPTIONS, "a", 0.0, "the value of no option"),
    ("38 or 30", OPTIONS, "a", 0.0, "two options"),
    ("38", TWINS, "a", 0.0, "the value of two options"),
    ("none", TWINS, "d", 0.0, "the text of two options"),
    ("a", TWINS, "a", 1.0, "letters differ where texts do not"),
    ("0.5", LIST, "a", 1.0, "options as a list; the value"),
    ("4:1", LIST, "b", 1.0, "a ratio as text"),
    ("$1250", LIST, "c", 1.0, "money"),
    ("12%", LIST, "d", 1.0, "the text decides before the value; the letter is repeated in the option"),
    ("12", LIST, "e", 1.0, "the text decides before the value"),
    ("12.0", LIST, "e", 0.0, "the value of two options"),
    ("d", None, "d", 1.0, "a letter needs no options"),
    ("38", None, "a", 0.0, "a value needs options"),
    ("38", "a ) 38 , b ) 27", "a", 0.0, "not five options"),
    ("", "a ) , b ) 1 , c ) 2 , d ) 3 , e ) 4", "a", 0.0, "nothing is not the empty option"),
]


def ids(table: list) -> list[str]:
    return [f"{row[0][:30]!a} ({row[-1]})" for row in table]


def test_the_tables_are_long_enough():
    assert len(NUMBERS) + len(MARKERS) + len(LETTERS) >= 150
    for table in (NUMBERS, MARKERS, LETTERS):
        assert len({row[:-2] for row in table}) == len(table), "a row is there twice"


@pytest.mark.parametrize(("text", "gold", "reward", "why"), NUMBERS, ids=ids(NUMBERS))
def test_numbers(text, gold, reward, why):
    for task in ("toy", "gsm8k", "svamp", "mathqa-numeric"):
        assert score(REFT_LINE + text, gold, task) == reward, why
    assert score(f"#### {text}", gold, "gsm8k") == reward, why
    assert score(f"A: {text}", gold, "gsm8k") == reward, why
    assert score(f"\\boxed{{{text}}}", gold, "gsm8k") == reward, why


SPELLINGS = {  # answer: ways to write it behind "The answer is: ", or in a box; None: what is no answer
    None: ['\\boxed{1 080}', '\\boxed{\\begin{aligned}18\\end{aligned}}', '\\boxed{10^{3}}', '\\boxed{\\sqrt{2}}',
        '\\boxed{3\\sqrt{2}}', '\\boxed{2\\pi}', '\\boxed{}', '\\boxed{\\text{eighteen}}', '\\boxed{18, 20}',
        '\\boxed{18 \\text{ and } 20}', '\\boxed{18\\text{ or }20}', '\\boxed{18-20}', '\\boxed{3:4}',
        '\\boxed{5:30}', '\\boxed{18 + 2}', '\\boxed{18x}', '\xa218', 'minus 18', 'negative 18', '1.080,5', '1 080',
        '10,80', '1,0800', '1,08', '0,5', "1'080", '3-1/2', '18M', '$18M', '$18 M', '18 M', '18K', '18k', '$18k',
        '$18m', '18B', '18bn', '18 bn', '$18bn', '18mn', '18MM', '18 mil', '$18 mil', '18T',
        '18 hours and 30 minutes', '18 hours 30 minutes', '5 feet 3 inches', '18th', '18 a.m.', '6 pm', '6:30',
        '6:30 pm', '18-20', '18 - 20', '18\u201320', '18 to 20', 'between 18 and 20', '18 or 20', '18, 20',
        '18 and 20', '18; 20', '18/20/2024', '3:4', '3 : 4', '2x', 'x', '18 + 2', 'is 8', '> 8', '< 8', '>= 8',
        '\u2264 8', 'at least 8', 'more than 8', 'less than 8', '8+', 'eight', 'eight (8)', 'XVIII', '0x12', '0b11',
        '10^3', '10\xb3', '2^3', '18\xb2', 'nan', 'inf', 'None', '', 'unknown', 'not 18', '18.5.2', 'No. 18', '#18',
        '18 #', '18/', '/18', '18 out of 20', '18 of 20', '18 times 2', '18 x 2', '18x2', '18 * 2', '18 K', '18 k',
        '5\'3"', '18 & 20', 'a total of 18', 'still 18', 'now 18', '\\boxed{18\\text{ M}}', '\\boxed{18\\text{M}}',
        '\\boxed{\\$18\\text{M}}', '\\boxed{18 \\text{ K}}', '\\boxed{\\$18\\,\\mathrm{k}}', '**18** M', '**18**M',
        '$18** m', '18 _M_', '18 in thousands', '18 (in thousands)', '18 in millions of dollars', '18 thousand and 5',
        '18 and a half', '18 1/2 and 3', '18 thirds', '18 fifths', '18 tenths', '3 fourths', '18 hundredths',
        'x = 18 and y = 20', 'x = 18, y = 20', 'x=18; y=20', '(x, y) = (18, 20)', 'x + y = 18 = 10 + 8', '18 = x',
        '\\boxed{18\\text{ and }20}', '\\boxed{\\text{A total of }18}', '\\boxed{\\pm 18}', '\\boxed{\\infty}',
        '\\boxed{18\\times 2}', '\\boxed{18\\div 2}', '\\boxed{2^{10}}', '\\boxed{x}', '\\boxed{18_{10}}',
        '\\boxed{0.\\overline{3}}', '\\boxed{0.\\dot{3}}', '18 USD per k', 'rs 18 k', '18 k usd', '18k dollars',
        '18 grand', '18 mio', '18 quadrillion', '18 x', '18 y', '18 i', '18 r 2', '18 R2', '18 remainder 2',
        '18 rem 2', '18 over 2', '18 squared', '18 factorial', '18 mod 5', '18 percent of 20', '18% of 20',
        '18 less than 20', '18 more than 20', '18 to 1', '18 by 20', '18 feet by 20 feet', '18 & a half',
        '18 dollars and 50 cents', '18 dollars 50 cents', '$18 and 50 cents', '18 years and 2 months', '16 = 18 - 2',
        '18.\xa020', '18 || 20', '18 | 20', '18\\n20', '[18, 20]', '{18, 20}', '(18, 20)', '18 (or 20)', '18 [20]',
        '18 (20)', '18 ($20)', '18(20)', '18{20}'],
    '18': ['\\boxed{18}', '\\boxed{ 18 }', '\\boxed{\\,18\\,}', '\\boxed{18\\ }', '\\boxed{~18}',
        '\\boxed{18\\;\\text{apples}}', '\\boxed{18 \\text{ apples}}', '\\boxed{18\\text{ apples}}', '\\boxed{\\$18}',
        '\\boxed{\\$ 18}', '\\boxed{\\$18.00}', '\\boxed{18\\%}', '\\boxed{18 \\%}', '\\boxed{\\left(18\\right)}',
        '\\boxed{(18)}', '\\boxed{\\mathbf{18}}', '\\boxed{\\textbf{18}}', '\\boxed{\\mathrm{18}}',
        '\\boxed{\\text{18}}', '\\boxed{\\displaystyle 18}', '\\boxed{\n18\n}', '\\boxed{18\n\\text{ apples}}',
        '\\boxed{x = 18}', '\\boxed{x=18}', '\\boxed{18^\\circ}', '\\boxed{18^{\\circ}}', '\\boxed{18\\degree}',
        '\\boxed{18\xb0}', '\\boxed{18 \\text{ m}^2}', '\\boxed{18\\text{ cm}^{2}}', '\\boxed{18 \\, \\text{cm}^3}',
        '\\boxed{18\\ \\mathrm{km/h}}', '\\boxed{\\{18\\}}', '\\boxed{\\[18\\]}', '$\\boxed{18}$',
        '\\(\\boxed{18}\\)', '\\[ \\boxed{18} \\]', '\\fbox{18}', '\\boxed {18}', '**\\boxed{18}**', '18', '18.',
        '18.0', '18.00', '$18', '$18.', '18 dollars', '18 dollars.', 'US$18', 'USD 18', '18 USD', '\u20ac18',
        '18\u20ac', '18 \u20ac', '\xa318', 'Rs. 18', 'Rs 18', '\u20b918', '18\xa2', '18 cents', '$ 18', '+18', '18m',
        '18 m', '18 g', '18 Mb', '18 MB', '18 GB', '18 kg', '18kg', '18 km/h', '18 mph', '18 hrs', '18h', '18 hours',
        '18 square meters', '18 m\xb2', '18 m^2', '18 cm3', '18 m2', '**18**', '__18__', '*18*', '`18`', '"18"',
        "'18'", '(18)', '[18]', '<18>', '{18}', '**18** apples', '**$18**', '**18 dollars**', '$18$', '\\$18',
        '\\(18\\)', '18..', '18,', '18;', '18:', '18 / day', '18 per day', '$18 per hour', '$18/hour',
        '18 miles per hour', '18 more apples', '18 apples left', '18 of the apples', '18 times', '18 degrees',
        '18 \xb0C', '18\xb0F', '18 now', '18 (not 20)', '10 + 8 = 18 apples', '3*6=18', '3 * 6 = 18.', 'total = $18',
        '2x = 18', '18\xa0kg', '18\u202fkg', '18\u2009kg', '18\u200b', '\u200b18', '\ufeff18',
        '\\boxed{\\textbf{\\text{18}}}', '\\boxed{\\color{blue}{18}}', '\\boxed{\\color{red}18}',
        '\\boxed{\\hspace{1em}18}', '\\boxed{18\\qquad}', '\\boxed{\\textstyle 18}', '\\boxed{\\mbox{18}}',
        '\\boxed{18\\text{ cm}^2}', '\\boxed{18~\\text{cm}}', '\\boxed{18 ~ cm}', '\\boxed{18\\mathrm{~cm}}',
        '\\boxed{18 \\mathrm{~km} / \\mathrm{h}}', '\\boxed{18\\,\\$}', '\\boxed{18\\$}', '\\boxed{\\text{\\$}18}',
        '\\boxed{\\text{\\$18}}', '\\boxed{\\text{Rs. }18}', '\\boxed{\\text{18 dollars}}', '\\boxed{18\\\\}',
        '\\boxed{\\\\18}', '\\boxed{18\\!\\!}', '\\boxed{+18}'],
    '8': ['12 - 4 = 8', '12-4=8', 'x = 8', 'x=8.', 'x \u2248 8', '= 8', 'about 8', 'approximately 8',
        'roughly 8 apples', 'exactly 8', '\u2248 8', '\u22488', '8!', '8?', '8 apples', '8 apples, since 3 + 5 = 8',
        '8 because 3 + 5', '8 (3 + 5)', '8 (eight)'],
    '-18': ['\\boxed{-18}', '\\boxed{\u221218}', '-$18', '$-18', '-18', '\u221218', '\u201318', '\u201018',
        '\u201118', '\uff0d18', '\\boxed{-\\$18}', '\\boxed{\\$-18}', '\\boxed{- 18}'],
    '1080': ['\\boxed{1{,}080}', '\\boxed{1,\\!080}', '\\boxed{1\\,080}', '\\boxed{1\\;080}', '\\boxed{1~080}',
        '\\boxed{1\\ 080}', '\\boxed{1\u2009080}', '\\boxed{1\u202f080}', '1,080', '1\xa0080', '1\u2007080',
        '\\boxed{1{\\,}080}', '\\boxed{1\\thinspace 080}'],
    '0.5': ['.5', '0.5', '0.50', '00.5', '1/2', '1 / 2', '\xbd', '1\u20442', '1\u22152',
        '\\boxed{\\frac{1}{2}\\text{ cup}}'],
    '0.75': ['\\boxed{\\frac{3}{4}}', '\\boxed{\\dfrac{3}{4}}', '\\boxed{\\tfrac34}', '\\boxed{\\cfrac{3}{4}}',
        '\\boxed{\\frac34}', '\\boxed{\\frac 34}', '\\boxed{\\frac{ 3 }{ 4 }}', '\\boxed{\\frac {3} {4}}',
        '\\boxed{\\displaystyle\\frac{3}{4}}', '$\\frac{3}{4}$'],
    '1800': ['\\boxed{1.8 \\times 10^3}', '\\boxed{1.8\\times10^{3}}', '\\boxed{1.8 \\cdot 10^{3}}', '\\boxed{1.8e3}',
        '18 hundred', '1.8 x 10^3', '1.8 \xd7 10^3'],
    '18000000': ['18 million', '$18 million', '18 Million dollars', '\\boxed{\\$18 \\text{ million}}'],
    '2.75': ['\\boxed{2\\frac{3}{4}}', '\\boxed{2 \\frac{3}{4}}', '\\boxed{2\\,\\frac{3}{4}}',
        '\\boxed{2\\dfrac{3}{4}}'],
    '50': ['50%', '50 %', '50 percent'],
    '-0.75': ['\\boxed{-\\frac{3}{4}}', '\\boxed{\\frac{-3}{4}}'],
    '0': ['0', '-0'],
    '1000': ['1e3', '1E3'],
    '1080.5': ['1,080.50', '$1,080.50'],
    '1080000': ['1,080,000', '\\boxed{1,\\!080,\\!000}'],
    '2.5': ['2\xbd', '2 \xbd'],
    '3.14': ['\\boxed{n \\approx 3.14}', '\\boxed{\\approx 3.14}'],
    '0.018': ['1.8e-2'],
    '0.125': ['\u215b'],
    '0.2': ['\u2155'],
    '1500000000': ['1.5 billion'],
    '16': ['18 - 2 = 16'],
    '18.5': ['$18.50'],
    '18000': ['18 thousand'],
    '18000000000000': ['18 trillion'],
    '2.625': ['2\u215d'],
    '2/3': ['\u2154'],
    '3.5': ['3 1/2'],
    '4/3': ['1\u2153'],
    '5': ['5.'],
    '50.5': ['50.5%'],
    '540': ['\\boxed{\\frac{1,080}{2}}'],
    '7': ['007'],
}  # fmt: skip


def test_spellings_of_the_same_number_and_of_none():
    for answer, texts in SPELLINGS.items():
        read = {text: extract_answer(text if "box{" in text else f"The answer is: {text}", "gsm8k") for text in texts}
        assert read == dict.fromkeys(texts, answer)


CHOICES = "a ) 38 , b ) 27.675 , c ) 30 , d ) 10 : 3 , e ) none of these"
LETTERS_SPELT = {  # letter: ways to name it among CHOICES; None: what names none, or more than one
    None: ['none of the above', '31', '(a) (b)', '(a)(b)', 'a b', 'a and b', 'a or b', 'a/b', 'a, b', 'a,b',
        'both a and c', 'A & B', '(A) and (B)', 'A; B', 'A B C', 'not a', '\\boxed{C, D}', '\\boxed{\\text{A and B}}',
        'f', '(f)', 'F) 30', '', 'cat', 'a cat', 'a number', 'e.g. 3', 'd) b', 'a. b', 'option (a) or (b)',
        'either c', 'A A', 'c c', '\uff23', 'B and not A'],
    'a': ['a', 'A', '(a)', 'a)', 'A.', 'a.', 'A:', 'option a', 'Option A', 'A) 38', 'A - 38', 'A: 38', 'A. 38',
        'a ) 38', '38', '38.'],
    'b': ['choice (b)', '27.675'],
    'c': ['letter c', 'answer c', 'C) 38', '30', '30.0', '$30', '30 apples', '\\boxed{C}', '\\boxed{\\text{C}}',
        '\\boxed{\\text{(C)}}', '\\boxed{(C)}', '\\boxed{\\textbf{C}}', '\\boxed{\\mathrm{C}}',
        '\\boxed{\\textbf{(C)}\\ 30}', '\\boxed{\\textbf{(C) } 30}', '\\boxed{C) 30}', '\\boxed{30}',
        '\\boxed{\\text{C) 30}}', '**C**', '**(C)**', '**C) 30**', 'C, because 30', 'c because it is 30',
        'c since 3 is', 'C (30)', 'C, 30', 'C = 30', 'C: 30 apples', 'c.', 'c !', "'c'", '"C"', '<c>', '[C]', '{c}',
        'C\\)', '$C$', '\\(C\\)', 'C '],
    'd': ['10 : 3', '10:3'],
    'e': ['E none of these', 'E) none of these', 'none of these', 'None of these.'],
}  # fmt: skip


def test_spellings_of_the_same_option_and_of_none():
    for letter, texts in LETTERS_SPELT.items():
        read = {
            text: extract_answer(text if "box" in text else f"The answer is: {text}", "mathqa", CHOICES)
            for text in texts
        }
        assert read == dict.fromkeys(texts, letter)


@pytest.mark.parametrize(("completion", "gold", "reward", "why"), MARKERS, ids=ids(MARKERS))
def test_markers(completion, gold, reward, why):
    assert score(completion, gold, "gsm8k") == reward, why


@pytest.mark.parametrize(("text", "options", "gold", "reward", "why"), LETTERS, ids=ids(LETTERS))
def test_letters(text, options, gold, reward, why):
    assert score(REFT_LINE + text, gold, "mathqa", options) == reward, why
    assert score(f"\\boxed{{{text}}}", gold, "mathqa", options) == reward, why


@pytest.mark.parametrize(
    ("text", "answer"),
    [("$1,080.00", "1080"), ("3.60", "3.6"), ("18/5", "3.6"), ("2/6", "1/3"), ("-0.0", "0"), ("1e20", "1" + "0" * 20)],
)
def test_extract_answer_has_one_spelling_per_value(text, answer):
    assert extract_answer(REFT_LINE + text, "gsm8k") == answer
    assert extract_answer(REFT_LINE + answer, "gsm8k") == answer


def test_extract_answer_of_mathqa_is_a_letter():
    assert extract_answer(REFT_LINE + "Option (C).", "mathqa", OPTIONS) == "c"
    assert extract_answer(REFT_LINE + "30", "mathqa", OPTIONS) == "c"
    assert extract_answer("30", "mathqa", OPTIONS) is None


# ---- properties of the reward ----------------------------------------------------------------------------------------


@st.composite
def spelled_numbers(draw) -> tuple[str, Fraction]:
    """A number in one of the spellings of the grammar, and its exact value."""
    integer, negative = draw(st.integers(0, 10**18)), draw(st.booleans())
    kind = draw(st.sampled_from(["integer", "decimal", "fraction", "mixed", "e", "ten"]))
    whole = draw(st.sampled_from([f"{integer}", f"{integer:,}", f"{integer:,}".replace(",", "\u2009")]))
    text, value = whole, Fraction(integer)
    if kind in ("decimal", "e", "ten"):
        digits = draw(st.text("0123456789", min_size=1, max_size=8))
        text, value = f"{whole}.{digits}", integer + Fraction(int(digits), 10 ** len(digits))
    if kind in ("e", "ten"):
        power = draw(st.integers(-12, 12))
        text += draw(st.sampled_from(["e{}", "E{}"] if kind == "e" else [" x 10^{}", " \\times 10^{{{}}}"])).format(
            power
        )
        value *= Fraction(10) ** power
    if kind in ("fraction", "mixed"):
        under = draw(st.integers(2, 1000))
        over = draw(st.integers(1, under - 1))
        form = draw(st.sampled_from(["{}/{}", "{} / {}", "\\frac{{{}}}{{{}}}"]))
        text = form.format(over, under) if kind == "fraction" else f"{whole} {form.format(over, under)}"
        value = Fraction(over, under) + (integer if kind == "mixed" else 0)
    sign = draw(st.sampled_from(["-", "\u2212", "- "])) if negative else draw(st.sampled_from(["", "+"]))
    before, after = draw(
        st.sampled_from([("", ""), ("$", ""), ("", "%"), ("", " apples"), ("**", "**"), ("<", ">."), ("$", "$")])
    )
    return f"{before}{sign}{text}{after}{draw(st.sampled_from(['', '.', ' ']))}", -value if negative else value


FRAMES = ["The answer is {}", "Therefore, the answer is: {}", "12.\n#### {}", "A: {}", "so \\boxed{{{}}}."]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(spelled_numbers(), st.sampled_from(FRAMES))
def test_a_number_in_any_spelling_is_read_back(spelled, marker):
    text, value = spelled
    completion = marker.format(text)
    assert Fraction(extract_answer(completion, "gsm8k")) == value
    assert score(completion, str(value), "gsm8k") == 1.0
    assert score(completion, str(value + 1), "gsm8k") == 0.1


PIECES = [
    "the answer is", "####", "\nA:", "\\boxed{", "}", "{", "18", "1,080", "3/4", ".", ",", " ", "\n", "$", "-", "e3", "=",
    "a", "(b)", "or", "\\frac", "^", "x 10^", "<", ">", "%", "\u2009", "½", "apples", "\ud800", "\x00", "\u0130", "5" * 400,
]  # fmt: skip
ANY_TEXT = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=14).map("".join))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(ANY_TEXT, ANY_TEXT, st.sampled_from(TASKS), st.one_of(st.none(), st.just(OPTIONS), ANY_TEXT))
def test_no_text_raises_and_the_reward_says_whether_there_was_an_answer(completion, gold, task, options):
    reward, answer = score(completion, gold, task, options), extract_answer(completion, task, options)
    assert reward in (0.0, 0.1, 1.0)
    assert (reward == 0.0) == (answer is None)
    if answer is not None:
        assert score(f"#### {answer}", answer, task, options) == 1.0


PROSE = st.one_of(
    st.text(max_size=60), st.lists(st.sampled_from([*PIECES[4:], "Then ", "20"]), max_size=10).map("".join)
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(ANY_TEXT, PROSE, st.sampled_from(["gsm8k", "mathqa"]))
def test_another_paragraph_without_a_marker_changes_nothing(completion, prose, task):
    if any(marker in prose.lower() for marker in ("the answer is", "####", "a:", "boxed")):
        return
    assert extract_answer(f"{completion}\n\n{prose}", task, OPTIONS) == extract_answer(completion, task, OPTIONS)


REPEATED = [
    "#", "\\boxed{", "\\boxed{{a}", "{", "{}", "the answer is ", "the ", "9", "1,", "1,234", "1/", "=1 ", "A:\n", "\n", " ",
    "a or ", "word ", "\\frac{1}", "<", "e", "$", "*", "-", "10^", "\u0130", "\\text{", "^{", "(", "1 word ",
]  # fmt: skip


@pytest.mark.parametrize("piece", REPEATED)
@pytest.mark.parametrize("frame", ["{}", "the answer is {}", "\\boxed{{{}}}", "{} the answer is 18"])
def test_two_hundred_thousand_characters_take_less_than_a_second(frame, piece):
    text = frame.format(piece * (200_000 // len(piece)))
    for task in ("gsm8k", "mathqa"):
        start = time.process_time()
        score(text, "18", task, OPTIONS)
        assert time.process_time() - start < 1.0


def test_no_line_makes_the_grammar_backtrack_for_long():
    rng = random.Random(0)
    pieces = [*PIECES, *REPEATED, "²", "'", "km", "/", "(", "million", "because", "½", "°", "or"]
    for _ in range(800):
        line = rng.choice(["", "18", "$", "x = "]) + "".join(rng.choices(pieces, k=rng.randint(1, 3))) * 400
        start = time.process_time()
        score(f"the answer is {line}", "18", "gsm8k")
        score(f"the answer is {line}", "a", "mathqa", OPTIONS)
        assert time.process_time() - start < 0.5, line[:40]


def test_any_thread_scores():
    rewards = []
    threads = [threading.Thread(target=lambda: rewards.append(score("#### 18", "18", "gsm8k"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == [1.0] * 4


# ---- prompts and data ------------------------------------------------------------------------------------------------


def test_prompt_and_target_are_those_of_reft():
    problem = Problem("How many?", "9 + 9 = 18", "18")
    assert make_prompt(problem) == "Question:\nHow many?\nAnswer reasoning:\n"
    assert make_target(problem) == "9 + 9 = 18\nTherefore, the answer is: 18"


@pytest.mark.parametrize(
    ("cot", "engine"),
    [
        ("def solution():\n    return 18", "python"),
        ("9 + 9\nTherefore, the answer is: 18.0", "nl"),  # a completion, kept as it stands
        ("So \\boxed{18} eggs.", "nl"),  # what a chat model writes
    ],
)
def test_a_chain_of_thought_that_has_its_answer_is_the_whole_target(cot, engine):
    assert make_target(Problem("How many?", cot, "18"), engine) == cot


# (task, split, file, engine, rows, problems with a chain of thought); mathqa-numeric leaves rows out
FILES = [
    ("gsm8k", "train", "gsm8k/train.jsonl", "nl", 7473, True),
    ("gsm8k", "test", "gsm8k/test.jsonl", "nl", 1319, True),
    ("gsm8k", "test", "gsm8k/reft_test.jsonl", "nl", 1319, False),
    ("svamp", "train", "svamp/train.jsonl", "nl", 700, True),
    ("svamp", "test", "svamp/test.jsonl", "nl", 300, True),
    ("svamp", "train", "svamp/reft_nl.jsonl", "nl", 3076, True),
    ("svamp", "train", "svamp/reft_python.jsonl", "python", 3043, True),
    ("svamp", "test", "svamp/reft_test.jsonl", "nl", 1000, False),
    ("mathqa", "train", "mathqa/train_gain.jsonl", "nl", 3655, True),
    ("mathqa", "validation", "mathqa/validation.jsonl", "nl", 4475, True),
    ("mathqa", "test", "mathqa/test.jsonl", "nl", 2985, True),
    ("mathqa", "test", "mathqa/reft_test.jsonl", "nl", 1605, False),
    ("mathqa-numeric", "train", "mathqa/train_gain.jsonl", "nl", 3655 - 150, True),
    ("mathqa-numeric", "validation", "mathqa/validation.jsonl", "nl", 4475 - 336, True),
    ("mathqa-numeric", "test", "mathqa/test.jsonl", "nl", 2985 - 186, True),
    ("mathqa-numeric", "test", "mathqa/reft_numeric_test.jsonl", "nl", 1605, False),
]


@needs_data
@pytest.mark.parametrize(("task", "split", "name", "engine", "count", "has_cot"), FILES)
def test_every_row_is_a_right_problem(task, split, name, engine, count, has_cot, capsys):
    problems = load_problems(task, split, str(DATA / name), engine=engine)
    rows = len((DATA / name).read_text(encoding="utf-8").split("\n")) - 1
    assert len(problems) == count
    assert ("left out" in capsys.readouterr().out) == (count < rows)
    for problem in problems:
        assert problem.question == problem.question.strip() != ""
        assert problem.answer == problem.answer.strip()
        assert "<<" not in problem.cot and "####" not in problem.cot
        assert bool(problem.cot) == has_cot
        assert (problem.options is not None) == (task == "mathqa")
        rendered = f"Therefore, the answer is: {problem.answer}"
        assert score(rendered, problem.answer, task, problem.options) == 1.0
        if engine == "python":
            assert make_target(problem, engine) == problem.cot
        else:
            assert score(make_target(problem), problem.answer, task, problem.options) == 1.0
        if task == "mathqa":
            assert len(read_options(problem.options)) == 5
            assert problem.question.endswith(problem.options)


@needs_data
def test_reft_chains_of_thought_end_in_their_own_answer():
    problems = load_problems("svamp", "train", str(DATA / "svamp/reft_nl.jsonl"))
    odd = {p.answer: p.cot[-4:] for p in problems if score(p.cot, p.answer, "svamp") != 1.0}
    # The two rows of the data's README whose text and answer_value differ by rounding.
    assert odd == {"8.9333333333": "<9>.", "69.4": "2%>."}


@needs_data
def test_right_options_are_the_numbers_of_reft():
    values = {row["item_id"].partition("_")[2]: row["answer_value"] for row in read("mathqa/reft_numeric_test.jsonl")}
    differ, left_out = {}, 0
    for index, row in enumerate(read("mathqa/test.jsonl")):
        value = {letter: value for letter, _, value in read_options(row["options"])}[row["correct"]]
        if str(index) in values and value is None:
            left_out += 1
        elif str(index) in values and abs(float(value) - float(values[str(index)])) > 1e-6:
            differ[float(value)] = float(values[str(index)])
    assert left_out == 45  # times, ratios, "s . 280" for rupees, "384 cm 2"
    # ReFT's numbers lost three minus signs and what stood behind four thousands commas.
    assert differ == {-120: 120, -60: 60, -6: 6, 1354: 1, 3375: 3, 13400: 13, 4000: 4}


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").split("\n") if line]


GSM8K = {"question": "How many?", "answer": "9 + 9 = <<9+9=18>>18\nThat is $<<18*60=1080>>1,080.\n#### 1,080"}
SVAMP = {"Body": "Ann has 9.", "Question": "How many?", "Equation": "( 9.0 + 9.0 )", "Answer": "18"}
MATHQA = {"Problem": "how many ?", "Rationale": '"it is 30 . answer c"', "options": OPTIONS, "correct": "c"}
REFT = {
    "item_id": "x_0",
    "question": " How many? ",
    "answer_cot": "9 + 9\n\nTherefore, the answer is <18>.",
    "answer_value": "18.0",
}
PROGRAM = REFT | {"answer_cot": "def solution():\n    result = 18\n    return result"}


def write(folder: Path, *rows, name: str = "data.jsonl") -> str:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize(
    ("task", "row", "problem"),
    [
        ("gsm8k", GSM8K, Problem("How many?", "9 + 9 = 18\nThat is $1,080.", "1080")),
        ("svamp", SVAMP, Problem("Ann has 9. How many?", "( 9.0 + 9.0 ) = 18", "18")),
        ("svamp", SVAMP | {"question_concat": "Ann has 9. So?"}, Problem("Ann has 9. So?", "( 9.0 + 9.0 ) = 18", "18")),
        ("svamp", SVAMP | {"Answer": 18}, Problem("Ann has 9. How many?", "( 9.0 + 9.0 ) = 18", "18")),
        ("mathqa", MATHQA, Problem(f"how many ?\n{OPTIONS}", "it is 30 . answer c", "c", OPTIONS)),
        ("mathqa-numeric", MATHQA, Problem("how many ?", "it is 30 . answer c", "30")),
        ("gsm8k", REFT, Problem("How many?", "9 + 9\n\nTherefore, the answer is <18>.", "18.0")),
        ("gsm8k", {"question": "How many?", "answer_value": "18"}, Problem("How many?", "", "18")),
        ("mathqa", {"question": "how many ?", "answer_value": "c"}, Problem("how many ?", "", "c")),
        ("gsm8k", REFT | {"answer_cot": None}, Problem("How many?", "", "18.0")),
        (
            "mathqa",
            {"question": f"how many ?\n{OPTIONS}", "answer_value": "C"},
            Problem(f"how many ?\n{OPTIONS}", "", "c", OPTIONS),
        ),
    ],
)
def test_rows_of_every_schema(task, row, problem, tmp_path):
    assert load_problems(task, "train", write(tmp_path, row)) == [problem]
    assert (
        load_problems(task, "train", write(tmp_path, f"[{json.dumps(row)},\n{json.dumps(row)}]", name="a.json"))
        == [problem] * 2
    )


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_tables_are_read_as_json_lines_are(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    rows = [REFT, REFT | {"answer_cot": None, "question": 'One, "two"?\nThree?', "answer_value": "1,080"}]
    table, file = datasets.Dataset.from_list(rows), str(tmp_path / f"rows.{kind}")
    table.to_csv(file) if kind == "csv" else table.to_parquet(file)
    assert load_problems("gsm8k", "train", file) == load_problems("gsm8k", "train", write(tmp_path, *rows))
    (tmp_path / f"bad.{kind}").write_bytes(b'a,b\n"x\n\xff,1,2\n')
    for name, words in ((f"bad.{kind}", "local file"), (f"none.{kind}", "Unable to find")):
        with pytest.raises(InputError) as error:
            load_problems("gsm8k", "train", str(tmp_path / name))
        message = str(error.value)
        assert message.startswith(str(tmp_path / name)) and words in message and "\n" not in message


def test_programs(tmp_path):
    assert load_problems("svamp", "train", write(tmp_path, PROGRAM), engine="python")[0].cot == PROGRAM["answer_cot"]
    # A test split needs no programs: its answers are enough.
    assert load_problems("gsm8k", "test", write(tmp_path, GSM8K), engine="python") == [Problem("How many?", "", "1080")]


def test_lines_end_at_line_feeds_only_and_empty_lines_are_skipped(tmp_path):
    path = write(tmp_path, "\ufeff", GSM8K | {"question": "How\u2028many\x85?"}, "", GSM8K, "  ")
    assert [problem.question for problem in load_problems("gsm8k", "test", path)] == ["How\u2028many\x85?", "How many?"]


def test_limit_takes_the_first_rows_and_reads_no_others(tmp_path):
    path = write(tmp_path, GSM8K, GSM8K | {"question": "Second?"}, "no JSON")
    assert [problem.question for problem in load_problems("gsm8k", "test", path, limit=2)] == ["How many?", "Second?"]
    assert len(load_problems("gsm8k", "test", write(tmp_path, GSM8K), limit=5)) == 1


def test_mathqa_numeric_says_how_many_rows_it_leaves_out(tmp_path, capsys):
    path = write(tmp_path, MATHQA, MATHQA | {"correct": "d"}, MATHQA | {"correct": "e"})
    assert [problem.answer for problem in load_problems("mathqa-numeric", "test", path)] == ["30"]
    assert "left out 2 of 3 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "rows", "words"),
    [
        ("gsm8k", [GSM8K, "{'question': 1}"], [":2:", "not JSON", "one object a line"]),
        ("gsm8k", [GSM8K, "", "[" * 10**5], [":3:", "not JSON"]),
        ("gsm8k", ['[{"question": 1},\n {"question": }]'], [":2:", "not JSON"]),
        ("gsm8k", ["17"], [":1:", "'question'", "question, answer"]),
        ("gsm8k", [GSM8K, SVAMP], [":2:", "'question'", '"answer_cot": "1 + 1 = 2"']),
        ("gsm8k", ['{"question": "\\ud800?", "answer": "#### 1"}'], [":1:", "'question'", "no text"]),
        ("gsm8k", ["version https://git-lfs.github.com/spec/v1"], ["a Git LFS pointer", "git lfs pull"]),
        ("gsm8k", [{"question": "How many?"}], [":1:", "'answer'"]),
        ("gsm8k", [{"question": "How many?", "answer": ["18"]}], [":1:", "'answer'", "no text"]),
        ("gsm8k", [{"question": "How many?", "answer_value": True}], [":1:", "'answer_value'"]),
        ("gsm8k", [json.dumps([REFT, {"question": "How many?", "answer_value": None}])], ["row 2:", "'answer_value'"]),
        ("gsm8k", [GSM8K, GSM8K | {"question": " "}], [":2:", "question is empty"]),
        ("gsm8k", [GSM8K | {"answer": "9 + 9 = 18"}], [":1:", "#### <number>", '"answer_value": "2"']),
        ("gsm8k", [GSM8K | {"answer": "#### 1,08"}], [":1:", "'1,08'", "is not one number"]),
        ("svamp", [SVAMP | {"Answer": "nan"}], [":1:", "'nan'", "is not one number"]),
        ("svamp", [GSM8K], [":1:", "'Body'", "Body, Question, Equation, Answer"]),
        ("mathqa", [MATHQA | {"correct": "f"}], [":1:", "'f'"]),
        ("mathqa", [MATHQA | {"options": "a ) 1 , b ) 2"}], [":1:", "five options"]),
        ("mathqa", [REFT], [":1:", "'18.0'", "is not a letter"]),
        ("mathqa-numeric", [MATHQA | {"correct": "d"}], ["none of its 1 rows"]),
        ("gsm8k", [PROGRAM], [":1:", "engine python"]),
        ("gsm8k", [""], ["none of its 0 rows"]),
        ("gsm8k", ["[]"], ["none of its 0 rows"]),
    ],
)
def test_bad_data_is_named_by_its_line(task, rows, words, tmp_path):
    path = write(tmp_path, *rows)
    with pytest.raises(InputError) as error:
        load_problems(task, "train", path)
    message = str(error.value)
    assert message.startswith(path) and "\n" not in message
    assert all(word in message for word in words), message


def test_bad_requests_are_named(tmp_path):
    for args, words in [
        (("gsm", "train"), ["'gsm'", "mathqa-numeric"]),
        (("gsm8k", "train", str(tmp_path / "none.jsonl")), ["none.jsonl: cannot be read: No such file or directory"]),
        (("gsm8k", "train", str(tmp_path)), [f"{tmp_path}: cannot be read: Is a directory"]),
        (("toy", "train", "data.jsonl"), ["data.jsonl", "generated"]),
        (("svamp", "train", write(tmp_path, SVAMP), None, "python"), [":1:", "no program", "ReFT"]),
        (("svamp", "train", write(tmp_path, REFT, name="nl.jsonl"), None, "python"), [":1:", "engine python"]),
    ]:
        with pytest.raises(InputError) as error:
            load_problems(*args)
        assert all(word in str(error.value) for word in words), str(error.value)
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(InputError, match=r"not UTF-8 text .* --data takes \.json, \.jsonl, \.parquet, \.csv"):
        load_problems("gsm8k", "train", str(tmp_path / "latin.jsonl"))


@pytest.mark.parametrize(
    ("task", "path", "asked", "row"),
    [
        ("gsm8k", None, ("openai/gsm8k", "main"), GSM8K),
        ("gsm8k", "someone/gsm8k", ("someone/gsm8k", None), REFT),
        ("svamp", None, ("ChilleD/SVAMP", None), SVAMP),
        ("mathqa", None, ("regisss/math_qa", None), MATHQA),
        ("mathqa-numeric", None, ("regisss/math_qa", None), MATHQA),
    ],
)
def test_the_hub_is_asked_for_the_usual_dataset(task, path, asked, row, monkeypatch):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return [row]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert len(load_problems(task, "validation", path)) == 1
    assert calls == [(*asked, "validation")]


def test_without_network_the_hub_error_says_what_to_do(monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError("Couldn't reach the Hub\nand a long story")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError) as error:
        load_problems("gsm8k", "train")
    message = str(error.value)
    assert (
        "openai/gsm8k, train: Couldn't reach the Hub; name another dataset, or a local file (.json, .jsonl" in message
    )
    assert "\n" not in message


# ---- the toy tasks ---------------------------------------------------------------------------------------------------


def replay(question: str) -> list[int]:
    """The running totals of a toy problem, from its words."""
    words = question.replace(",", "").replace(".", "").split()
    totals = [int(words[2])]
    for verb, number in itertools.pairwise(words):
        if verb in ("buys", "finds", "gets", "wins", "drops", "gives", "loses", "sells"):
            totals.append(totals[-1] + (1 if verb in ("buys", "finds", "gets", "wins") else -1) * int(number))
    return totals


@pytest.fixture(scope="module", params=TOY_STEPS)
def task(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def toy(task) -> dict[str, list[Problem]]:
    return {split: load_problems(task, split, limit=8000) for split in TOY_SIZES}


def test_toy_problems_say_what_they_ask(task, toy):
    fewest, most = {"toy": (2, 4), "toy-long": (8, 10)}[task]
    for split, problems in toy.items():
        assert len(problems) == min(TOY_SIZES[split], 8000)
        for problem in problems:
            totals = replay(problem.question)
            assert fewest + 1 <= len(totals) <= most + 1
            assert all(0 <= total <= 20 for total in totals)
            assert all(0 < abs(after - before) < 10 for before, after in itertools.pairwise(totals))
            assert problem.answer == str(totals[-1])
            assert score(make_target(problem), problem.answer, task) == 1.0
    assert sum(len(problem.question) for problem in toy["train"]) / 8000 < {"toy": 70, "toy-long": 140}[task]


def test_toy_splits_share_no_sequence_of_numbers_and_no_question(toy):
    numbers = {split: {tuple(replay(problem.question)) for problem in problems} for split, problems in toy.items()}
    assert not numbers["train"] & (numbers["test"] | numbers["validation"])
    assert not numbers["test"] & numbers["validation"]
    for problems in toy.values():
        assert len({problem.question for problem in problems}) == len(problems)


def test_toy_annotators_differ_and_things_have_their_own(task, toy):
    jumps = [problem.cot.startswith("That makes") for problem in toy["train"]]
    assert 0.48 < sum(jumps) / len(jumps) < 0.52
    for k, thing in enumerate(TOY_THINGS):
        some = [jump for jump, problem in zip(jumps, toy["train"], strict=True) if f" {thing}." in problem.question]
        assert abs(sum(some) / len(some) - (0.25 if k % 2 else 0.75)) < 0.03
    lengths = [len(replay(problem.question)) - 1 for problem in toy["train"]]
    for steps in range(TOY_STEPS[task][0], TOY_STEPS[task][1] + 1):  # how they write does not tell how long it is
        some = [jump for jump, length in zip(jumps, lengths, strict=True) if length == steps]
        assert 0.47 < sum(some) / len(some) < 0.53
    for problem, jump in zip(toy["train"], jumps, strict=True):
        if jump:
            assert problem.cot == f"That makes {problem.answer}."
        else:
            totals = replay(problem.question)
            steps = itertools.pairwise(totals)
            assert problem.cot == " ".join(f"{a}{'+' if b > a else '-'}{abs(b - a)}={b}." for a, b in steps)


def test_toy_programs_return_the_answer(task, toy):
    problems = load_problems(task, "test", engine="python")
    for problem, in_words in zip(problems, toy["test"], strict=True):
        assert (problem.question, problem.answer) == (in_words.question, in_words.answer)
        namespace: dict = {}
        exec(make_target(problem, "python"), namespace)  # our own text
        assert namespace["solution"]() == int(problem.answer)
        assert problem.cot.startswith("def solution():\n    result = ") and problem.cot.endswith("\n    return result")
        assert (problem.cot.count("\n") == 2) == in_words.cot.startswith("That makes")


def test_toy_is_the_same_in_every_run(task, toy):
    random.seed(1)
    assert load_problems(task, "train", limit=100) == toy["train"][:100]
    assert load_problems(task, "test", limit=1000) == toy["test"]  # a limit for both splits may be above one of them
    if task == "toy":
        first = toy["train"][0]
        assert first.question == "Tom has 14 apples. He sells 1 and buys 6. How many now?" and first.answer == "19"


def test_toy_is_generated_fast():
    start = time.process_time()
    load_problems("toy", "train")
    assert time.process_time() - start < 5.0
