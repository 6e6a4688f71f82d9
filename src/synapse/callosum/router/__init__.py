"""The queue between senders and one handler, with two tracts and priorities."""
