"""Bringing submissions in, whatever form they come in: reads strangers' files, writes submitted/, prints nothing.

    forms       which form a source has, and its deliveries: one for each student that it names
    folder  canvas  moodle  gradescope  git  exchange      one form each
    tree  archive  repository      a folder, a zip, a Git repository, read so that no name and no size can do harm
    people      who is meant, by the gradebook's roster
    choose      which of a student's files is the notebook
    store       into submitted/, and what was there before into superseded/
    times       times as people, nbgrader and Gradescope write them
"""
