# SPDX-License-Identifier: MIT
"""The ladder's page: charts and tables as one HTML file."""
