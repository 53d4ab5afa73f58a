"""The command-line applications. Nothing else imports them."""
