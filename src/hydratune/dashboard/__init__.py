"""`hydratune dashboard`: one page on 127.0.0.1 for every study and every run below a folder. Needs the extra [dashboard]."""
