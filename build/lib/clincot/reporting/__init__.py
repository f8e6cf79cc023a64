"""Reports for people: a run's HTML page with gallery and figures, and the lineage of a single record.

The page that the Kubeflow UI shows is built in clincot.pipelines.
"""
