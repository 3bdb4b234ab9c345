"""What the recipes need: data, training, suites, sweeps, reports, costs, and the Hub."""
