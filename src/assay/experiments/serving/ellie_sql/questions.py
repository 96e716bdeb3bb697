"""Questions with gold SQL: thirty-two queries in three classes, each in several wordings, of tables drawn by a seed.

A *template* is one query in one wording. The first two wordings of each query are the examples that pipelines edit and the language model
is shown, over the tables of `VIEWS`. Routers learn from the next three, over `VIEWS` too. They are judged on the last two, over tables of
other databases (`JUDGED`), and on `NEW_QUERIES` besides, from which no router learns. What is judged was written when pipelines, features
and settings were fixed. Once some of it had been asked, only the folds of tuning and the questions to learn from became fewer, for time.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.experiments.serving.ellie_sql.databases import View
from assay.methods.serving.ellie_sql import Database, Executed, Schema

SIMPLE, JOINED, NESTED = 0, 1, 2
PARTS = ("examples", "learnt", "judged")
TOGETHER = "FROM {P} JOIN {C} ON {Ck} = {Pk}"


@dataclass(frozen=True)
class Query:
    """SQL over a parent and a child table, its class, and ways to ask for it: two examples, those to be learnt from, two to be judged.

    In SQL {P} and {C} are tables, {Pk} {Pn} {Ck} {Cn} the parent's key and name and the child's foreign key and name, {a} and {b}
    numbers of the child; in a wording {p} {ps} {c} {cs} are nouns. {v} is a parent's name, {w} a child's, {n} and {m} are numbers.
    """

    name: str
    kind: int
    sql: str
    wordings: tuple[str, ...]

    def numbered(self, part: str) -> range:
        """The numbers of the wordings of a part, one of `PARTS`."""
        first, last = 2, len(self.wordings) - 2
        return {"examples": range(first), "learnt": range(first, last), "judged": range(last, last + 2)}[part]


QUERIES = (
    Query("count", SIMPLE, "SELECT COUNT(*) FROM {C}", (
        "How many {cs} are there?", "Count all {cs}.", "What is the total number of {cs}?", "Give me the number of all {cs} we have.",
        "How many {cs} does the database hold?",
        "Tell me the number of {cs} on record.", "What is the size of the list of {cs}?")),
    Query("above", SIMPLE, "SELECT {Cn} FROM {C} WHERE {a} > {n}", (
        "Which {cs} have a {a} above {n}?", "List the {cs} whose {a} is more than {n}.", "Show every {c} with {a} over {n}.",
        "Find {cs} with a {a} greater than {n}.", "What {cs} exceed {n} in {a}?",
        "Name each {c} with {a} beyond {n}.", "I am looking for {cs} of {a} higher than {n}.")),
    Query("of one", SIMPLE, "SELECT {a} FROM {C} WHERE {Cn} = '{w}'", (
        'What is the {a} of the {c} "{w}"?', 'Show the {a} of "{w}".', 'For the {c} "{w}", tell me the {a}.',
        'How large is the {a} of {c} "{w}"?', 'I need the {a} for "{w}".',
        'What does "{w}" have as its {a}?', 'Look up the {a} that belongs to the {c} "{w}".')),
    Query("largest value", SIMPLE, "SELECT MAX({a}) FROM {C}", (
        "What is the largest {a} of any {c}?", "Give the maximum {a} among the {cs}.", "What is the highest {a} found in the {cs}?",
        "How high does the {a} of {cs} go at most?", "Tell me the top {a} of all {cs}.",
        "Of all {cs}, what is the biggest {a}?", "What is the record {a} among {cs}?")),
    Query("smallest value", SIMPLE, "SELECT MIN({a}) FROM {C}", (
        "What is the smallest {a} of any {c}?", "Give the minimum {a} among the {cs}.", "What is the lowest {a} found in the {cs}?",
        "How low does the {a} of {cs} go at least?", "Tell me the least {a} of all {cs}.",
        "Of all {cs}, what is the tiniest {a}?", "What {a} is the minimum for any of the {cs}?")),
    Query("average", SIMPLE, "SELECT AVG({a}) FROM {C}", (
        "What is the average {a} of the {cs}?", "Compute the mean {a} over all {cs}.", "How large is the {a} of a {c} on average?",
        "What {a} does a typical {c} have, on average?", "Give me the mean of the {a} of {cs}.",
        "Averaged over every {c}, what is the {a}?", "I want the average of {a} across {cs}.")),
    Query("count below", SIMPLE, "SELECT COUNT(*) FROM {C} WHERE {a} < {n}", (
        "How many {cs} have a {a} below {n}?", "Count the {cs} whose {a} is less than {n}.",
        "What is the number of {cs} with a {a} under {n}?",
        "How many {cs} stay below {n} in {a}?", "Number of {cs} whose {a} is smaller than {n}?",
        "For how many {cs} is the {a} lower than {n}?", "What count of {cs} has {a} short of {n}?")),
    Query("between", SIMPLE, "SELECT {Cn} FROM {C} WHERE {a} BETWEEN {n} AND {m}", (
        "Which {cs} have a {a} between {n} and {m}?", "List the {cs} with {a} from {n} to {m}.",
        "Show every {c} whose {a} lies in the range {n} to {m}.", "Find {cs} with a {a} of at least {n} and at most {m}.",
        "What {cs} fall between {n} and {m} in {a}?",
        "Which {cs} have {a} no lower than {n} and no higher than {m}?", "Name the {cs} with a {a} of {n} up to {m}.")),
    Query("count of one", JOINED, "SELECT COUNT(*) " + TOGETHER + " WHERE {Pn} = '{v}'", (
        'How many {cs} are in the {p} "{v}"?', 'Count the {cs} of the {p} "{v}".', 'What is the number of {cs} that belong to {p} "{v}"?',
        'For {p} "{v}", how many {cs} do we have?', 'How many {cs} does "{v}" have?',
        'Give the size of {p} "{v}" in {cs}.', 'Under "{v}", what is the number of {cs} listed?')),
    Query("count by", JOINED, "SELECT {Pn}, COUNT(*) " + TOGETHER + " GROUP BY {Pn}", (
        "How many {cs} does each {p} have?", "Count the {cs} by {p}.", "For every {p}, what is the number of {cs}?",
        "Show the number of {cs} per {p}.", "List each {p} with how many {cs} it has.",
        "Give a table of {ps} with the count of their {cs}.", "Per {p}, how many {cs} are listed?")),
    Query("average by", JOINED, "SELECT {Pn}, AVG({a}) " + TOGETHER + " GROUP BY {Pn}", (
        "What is the average {a} of the {cs} of each {p}?", "Compute the mean {a} of {cs} by {p}.",
        "For every {p}, how large is the {a} of its {cs} on average?", "Show the average {a} of {cs} per {p}.",
        "List each {p} with the mean {a} of its {cs}.",
        "Give a table of {ps} with the average {a} of their {cs}.", "Per {p}, what is the mean of {a} over {cs}?")),
    Query("largest of one", JOINED, "SELECT MAX({a}) " + TOGETHER + " WHERE {Pn} = '{v}'", (
        'What is the largest {a} of any {c} in the {p} "{v}"?', 'Give the maximum {a} among the {cs} of {p} "{v}".',
        'What is the highest {a} found in the {cs} of "{v}"?', 'In {p} "{v}", how high does the {a} of {cs} go at most?',
        'Tell me the top {a} of all {cs} of the {p} "{v}".',
        'Among the {cs} of "{v}", what is the biggest {a}?', 'What is the peak {a} of a {c} from the {p} "{v}"?')),
    Query("parent of", JOINED, "SELECT {Pn} " + TOGETHER + " WHERE {Cn} = '{w}'", (
        'Which {p} does the {c} "{w}" belong to?', 'Name the {p} of the {c} "{w}".', 'In which {p} is "{w}" found?',
        'What is the {p} that the {c} "{w}" is part of?', 'The {c} "{w}" comes from which {p}?',
        'Tell me which {p} has the {c} "{w}".', 'To what {p} should "{w}" be counted?')),
    Query("above of one", JOINED, "SELECT {Cn} " + TOGETHER + " WHERE {Pn} = '{v}' AND {a} > {n}", (
        'Which {cs} of the {p} "{v}" have a {a} above {n}?', 'List the {cs} in {p} "{v}" whose {a} is more than {n}.',
        'Show every {c} of "{v}" with {a} over {n}.', 'In the {p} "{v}", find {cs} with a {a} greater than {n}.',
        'What {cs} from {p} "{v}" exceed {n} in {a}?',
        'Of the {cs} in "{v}", name those with {a} beyond {n}.', 'For {p} "{v}", which {cs} have {a} higher than {n}?')),
    Query("sum of one", JOINED, "SELECT SUM({a}) " + TOGETHER + " WHERE {Pn} = '{v}'", (
        'What is the total {a} of the {cs} in the {p} "{v}"?', 'Sum the {a} over the {cs} of {p} "{v}".',
        'How much is the {a} of all {cs} of "{v}" together?', 'Add up the {a} of the {cs} that belong to {p} "{v}".',
        'For {p} "{v}", give the {a} summed over its {cs}.',
        'What do the {cs} of "{v}" have in {a} altogether?', 'Total up {a} for all {cs} in the {p} "{v}".')),
    Query("top", JOINED, "SELECT {Cn} FROM {C} ORDER BY {a} DESC LIMIT {n}", (
        "Which {n} {cs} have the largest {a}?", "List the top {n} {cs} by {a}.", "Show the {n} {cs} with the highest {a}.",
        "What are the {n} {cs} that lead in {a}?", "Rank the {cs} by {a}, largest first, and give the first {n}.",
        "Name the first {n} {cs} when sorted by {a} from the highest.", "Which {cs} are the best {n} in {a}?")),
    Query("more than so many", NESTED, "SELECT {Pn} " + TOGETHER + " GROUP BY {Pn} HAVING COUNT(*) > {n}", (
        "Which {ps} have more than {n} {cs}?", "List the {ps} with over {n} {cs}.", "Show every {p} that has a number of {cs} above {n}.",
        "Find {ps} to which more than {n} {cs} belong.", "What {ps} hold in excess of {n} {cs}?",
        "Name each {p} with upwards of {n} {cs}.", "Which {ps} count more than {n} {cs}?")),
    Query("above average", NESTED, "SELECT {Cn} FROM {C} WHERE {a} > (SELECT AVG({a}) FROM {C})", (
        "Which {cs} have a {a} above the average?", "List the {cs} whose {a} is more than the mean.",
        "Show every {c} with {a} over the average of all {cs}.", "Find {cs} with a {a} greater than that of a {c} on average.",
        "What {cs} exceed the mean {a}?",
        "Name each {c} with a {a} beyond the mean of all.", "Which {cs} have more {a} than the average {c}?")),
    Query("without", NESTED, "SELECT {Pn} FROM {P} WHERE NOT EXISTS (SELECT 1 FROM {C} WHERE {Ck} = {Pk} AND {a} > {n})", (
        "Which {ps} have no {c} with a {a} above {n}?", "List the {ps} without any {c} whose {a} is more than {n}.",
        "Show every {p} that lacks a {c} with {a} over {n}.", "Find {ps} none of whose {cs} has a {a} greater than {n}.",
        "For what {ps} does no {c} exceed {n} in {a}?",
        "Name each {p} where not one {c} has {a} beyond {n}.", "Which {ps} are free of {cs} with a {a} higher than {n}?")),
    Query("most", NESTED, "SELECT {Pn} " + TOGETHER + " GROUP BY {Pn} ORDER BY COUNT(*) DESC LIMIT 1", (
        "Which {p} has the most {cs}?", "Name the {p} with the largest number of {cs}.", "To which {p} do the most {cs} belong?",
        "Find the {p} that leads by how many {cs} it has.", "What {p} holds more {cs} than any other?",
        "What is the {p} with the greatest count of {cs}?", "By number of {cs}, which {p} comes first?")),
    Query("highest average", NESTED, "SELECT {Pn} " + TOGETHER + " GROUP BY {Pn} ORDER BY AVG({a}) DESC LIMIT 1", (
        "Which {p} has the highest average {a} of its {cs}?", "Name the {p} whose {cs} have the largest mean {a}.",
        "In which {p} is the {a} of {cs} highest on average?", "Find the {p} that leads by the average {a} of its {cs}.",
        "What {p} beats all others in mean {a} of {cs}?",
        "What is the {p} with the greatest mean {a} over its {cs}?", "By average {a} of its {cs}, which {p} comes first?")),
    Query("which is largest", NESTED, "SELECT {Cn} FROM {C} WHERE {a} = (SELECT MAX({a}) FROM {C})", (
        "Which {c} has the largest {a}?", "Name the {cs} with the maximum {a}.", "Show the {c} that has the highest {a} of all.",
        "What {c} leads in {a}?", "Find the {cs} whose {a} nothing else exceeds.",
        "Which {c} holds the record for {a}?", "Name the {c} at the very top in {a}.")),
    Query("count above average", NESTED, "SELECT COUNT(*) FROM {C} WHERE {a} > (SELECT AVG({a}) FROM {C}) AND {b} < {n}", (
        "How many {cs} have a {a} above the average and a {b} below {n}?",
        "Count the {cs} whose {a} is more than the mean and whose {b} is less than {n}.",
        "What is the number of {cs} with {a} over the average and {b} under {n}?",
        "How many {cs} exceed the mean {a} but stay below {n} in {b}?",
        "Number of {cs} with an above-average {a} whose {b} is smaller than {n}?",
        "For how many {cs} is {a} beyond the mean while {b} is lower than {n}?",
        "What count of {cs} has more {a} than average and {b} short of {n}?")),
    Query("groups above average", NESTED, "SELECT {Pn} " + TOGETHER + " GROUP BY {Pn} HAVING AVG({a}) > (SELECT AVG({a}) FROM {C})", (
        "Which {ps} have an average {a} of their {cs} above that of all {cs}?",
        "List the {ps} whose {cs} have a mean {a} of more than the overall mean.",
        "Show every {p} where the {a} of {cs} is on average over the average of all {cs}.",
        "Find {ps} whose mean {a} of {cs} is greater than the mean of everything.",
        "What {ps} exceed the overall average {a} with the average of their own {cs}?",
        "Name each {p} whose {cs} average more {a} than all {cs} together.",
        "Which {ps} lie above the mean {a} of all {cs} with the mean of their own?")),
)  # fmt: skip

NEW_QUERIES = (
    Query("bottom", SIMPLE, "SELECT {Cn} FROM {C} ORDER BY {a} LIMIT {n}", (
        "Which {n} {cs} have the smallest {a}?", "List the bottom {n} {cs} by {a}.",
        "Show the {n} {cs} with the lowest {a}.", "What are the {n} {cs} that come last in {a}?")),
    Query("with another column", SIMPLE, "SELECT {Cn}, {a} FROM {C} WHERE {b} > {n}", (
        "Which {cs} have a {b} above {n}, and what is the {a} of each?",
        "List the {cs} whose {b} is more than {n} together with their {a}.",
        "Show every {c} with {b} over {n}, and its {a} as well.",
        "Find the {a} of each of the {cs} with a {b} greater than {n}, by name.")),
    Query("all of one", JOINED, "SELECT {Cn} " + TOGETHER + " WHERE {Pn} = '{v}'", (
        'Which {cs} are in the {p} "{v}"?', 'List the {cs} of the {p} "{v}".',
        'Show every {c} that belongs to "{v}".', 'What {cs} does the {p} "{v}" contain?')),
    Query("largest by", JOINED, "SELECT {Pn}, MAX({a}) " + TOGETHER + " GROUP BY {Pn}", (
        "What is the largest {a} among the {cs} of each {p}?", "Give the maximum {a} of {cs} by {p}.",
        "For every {p}, how high does the {a} of its {cs} go at most?", "Show the top {a} of {cs} per {p}.")),
    Query("average of one", JOINED, "SELECT AVG({a}) " + TOGETHER + " WHERE {Pn} = '{v}'", (
        'What is the average {a} of the {cs} in the {p} "{v}"?', 'Compute the mean {a} over the {cs} of {p} "{v}".',
        'How large is the {a} of a {c} from "{v}" on average?', 'For the {p} "{v}", give the mean of {a} over its {cs}.')),
    Query("average above", NESTED, "SELECT {Pn} " + TOGETHER + " GROUP BY {Pn} HAVING AVG({a}) > {n}", (
        "Which {ps} have an average {a} of their {cs} above {n}?", "List the {ps} whose {cs} have a mean {a} of more than {n}.",
        "Show every {p} where the {a} of its {cs} is over {n} on average.", "Find {ps} with a mean {a} of {cs} greater than {n}.")),
    Query("fewest", NESTED, "SELECT {Pn} " + TOGETHER + " GROUP BY {Pn} ORDER BY COUNT(*) LIMIT 1", (
        "Which {p} has the fewest {cs}?", "Name the {p} with the smallest number of {cs}.",
        "To which {p} do the fewest {cs} belong?", "What {p} holds fewer {cs} than any other?")),
    Query("count at the smallest", NESTED, "SELECT COUNT(*) FROM {C} WHERE {a} = (SELECT MIN({a}) FROM {C})", (
        "How many {cs} have the smallest {a}?", "Count the {cs} with the minimum {a}.",
        "What is the number of {cs} at the lowest {a} of all?", "How many {cs} share the least {a} there is?")),
)  # fmt: skip
"""Queries that no router learns from: only examples of them are known."""


@dataclass(frozen=True)
class Question:
    """A question about a database, its gold SQL and result, and the template it comes from."""

    text: str
    sql: str
    database: str
    query: str
    kind: int
    template: str
    gold: Executed


def questions(
    views: Sequence[View],
    databases: Mapping[str, Database],
    schemas: Mapping[str, Schema],
    part: str,
    *,
    seed: int,
    each: int = 1,
    wordings: int = 3,
    queries: Sequence[Query] = QUERIES,
) -> list[Question]:
    """Every query in the first `wordings` wordings of a part, each of `each` different views; what fills them is drawn by `seed`.

    A question whose gold result is empty is drawn again, up to twenty times, then of another view: answers that find nothing are not
    asked for, as in the paper's evaluation. Raises ValueError where no view gives a result.
    """
    found = []
    for query in queries:
        for wording in query.numbered(part)[:wordings]:
            template = f"{query.name} {wording}"
            chance = np.random.default_rng([seed, zlib.crc32(template.encode())])
            order = [views[place] for place in chance.permutation(len(views))]
            asked = (_filled(query, wording, template, view, databases, schemas, chance) for view in order)
            fine = list(itertools.islice(filter(None, asked), each))
            if not fine:
                raise ValueError(f"{query.name!r} finds nothing in {', '.join(view.child for view in views)}")
            found += fine
    return found


def _filled(
    query: Query,
    wording: int,
    template: str,
    view: View,
    databases: Mapping[str, Database],
    schemas: Mapping[str, Schema],
    chance: np.random.Generator,
) -> Question | None:
    database, schema = databases[view.database], schemas[view.database]
    for _ in range(20):
        sql_words, said = _fills(query, view, database, schema, chance)
        sql = query.sql.format(**sql_words)
        gold = database.run(sql)
        if not gold.empty and gold.rows != ((None,),) and gold.rows != ((0,),):
            return Question(
                query.wordings[wording].format(**said), sql, view.database, query.name, query.kind, template, gold
            )
    return None


def _fills(
    query: Query, view: View, database: Database, schema: Schema, chance: np.random.Generator
) -> tuple[dict[str, Any], dict[str, Any]]:
    a, b = chance.choice(sorted(view.numbers), 2, replace=False)
    parent, child = view.parent, view.child
    key = schema.primary[parent]
    counted = "b" if "{b}" in query.sql else "a"
    column = {"a": a, "b": b}[counted]
    values = np.array([row[0] for row in database.run(f"SELECT {child}.{column} FROM {child}").rows], dtype=float)
    low, high = np.quantile(values, np.sort(chance.uniform(0.4, 0.95, 2)))
    n, m = (_number(value, values) for value in (low, high))
    if query.name == "more than so many":
        sizes = database.run(f"SELECT COUNT(*) FROM {child} GROUP BY {child}.{schema.between(child, parent)}").rows
        n = str(int(np.quantile([row[0] for row in sizes], chance.uniform(0.2, 0.7))) - 1)
    if query.name in ("top", "bottom"):
        n = str(int(chance.integers(3, 8)))
    names = database.run(
        f"SELECT {parent}.name FROM {parent} WHERE {parent}.{key} IN (SELECT {child}.{schema.between(child, parent)} FROM {child})"
    ).rows
    children = database.run(
        f"SELECT {child}.{view.child_name} FROM {child} GROUP BY {child}.{view.child_name} HAVING COUNT(*) = 1"
    ).rows
    v, w = (str(rows[chance.integers(len(rows))][0]) for rows in (names, children))
    sql_words = {
        "P": parent,
        "C": child,
        "Pk": f"{parent}.{key}",
        "Pn": f"{parent}.name",
        "Ck": f"{child}.{schema.between(child, parent)}",
        "Cn": f"{child}.{view.child_name}",
        "a": f"{child}.{a}",
        "b": f"{child}.{b}",
        "v": v.replace("'", "''"),
        "w": w.replace("'", "''"),
        "n": n,
        "m": m,
    }
    said = {
        "p": view.parent_nouns[0],
        "ps": view.parent_nouns[1],
        "c": view.child_nouns[0],
        "cs": view.child_nouns[1],
        "a": view.numbers[a],
        "b": view.numbers[b],
        "v": v,
        "w": w,
        "n": n,
        "m": m,
    }
    return sql_words, said


def _number(value: float, values: np.ndarray) -> str:
    """A bound as a person would say it."""
    if (values == np.round(values)).all():
        return str(int(value))
    return f"{value:.1f}" if np.abs(values).max() > 1 else f"{value:.2f}"
