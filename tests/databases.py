# SPDX-License-Identifier: Apache-2.0
"""Small real SQLite databases, laid out as Spider's: `NAME/NAME.sqlite`."""

import pathlib
import sqlite3

CONCERTS = """
CREATE TABLE singer (singer_id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INTEGER, fee REAL);
CREATE TABLE concert (concert_id INTEGER PRIMARY KEY, singer_id INTEGER REFERENCES singer, year TEXT, seats INTEGER);
INSERT INTO singer VALUES (1, 'Joe', 'NL', 52, 10.5), (2, 'Ann', 'US', 32, 20.0), (3, 'Lý', 'VN', 29, NULL),
    (4, 'Tim', 'US', 32, 0.1);
INSERT INTO concert VALUES (1, 1, '2014', 100), (2, 2, '2014', 80), (3, 2, '2015', 60), (4, 9, '2015', NULL);
CREATE INDEX ages ON singer (age);
CREATE VIEW old AS SELECT name FROM singer WHERE age > 30;
"""
NUMBERS = """
CREATE TABLE n (i INTEGER);
WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 3000) INSERT INTO n SELECT i FROM c;
"""


def make_databases(directory: pathlib.Path) -> pathlib.Path:
    """`concerts` and `numbers` in a directory."""
    for name, script in (("concerts", CONCERTS), ("numbers", NUMBERS)):
        (directory / name).mkdir(parents=True)
        connection = sqlite3.connect(directory / name / f"{name}.sqlite")
        connection.executescript(script)
        connection.close()
    return directory
