-- What PostgreSQL's image runs once, when its volume is new; the database `prefect` it makes itself.
CREATE DATABASE mlflow;
