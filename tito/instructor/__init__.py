"""Commands for instructors: from a course of nbgrader to feedback, through contained and repeatable grading."""
