"""Data sets: readers of published releases, and the folder layout that every stage reads.

A reader (VQA-RAD, SLAKE, IU X-Ray, DICOM, JSONL) turns a release into a folder of studies, questions and references;
clincot.datasets.ingest writes that folder. Rendered radiographs come from clincot.synthetic, and clincot.generation
decides what a policy is asked.
"""
