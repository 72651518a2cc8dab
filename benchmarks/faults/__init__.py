"""What the cluster does when parts of it fail: real Ray and Redis on hosts of their own."""
