"""What `moetier plan` predicts: shapes, costs, a simulated cluster, its bottleneck."""
