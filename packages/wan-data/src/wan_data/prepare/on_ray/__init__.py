"""The workers of a preparation as actors on a Ray cluster; nothing else imports Ray."""
