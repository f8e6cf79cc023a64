"""What people look at: a run's page, its gallery and figures, and the lineage of a single record.

The page shown in the Kubeflow UI is built in clincot.pipelines.
"""
