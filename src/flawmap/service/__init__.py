"""The service: models behind REST and a page, every inspection in a database."""
