"""Data sets: readers of published releases, and the folder layout that every stage reads.

A reader (VQA-RAD, SLAKE, IU X-Ray, DICOM, JSONL) turns a release into a folder of studies, questions and references;
`ingest` writes that folder. Rendered radiographs are made in clincot.synthetic; what is asked of a policy is decided in
clincot.generation.
"""
