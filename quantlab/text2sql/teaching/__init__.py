"""What a teacher and a judge are asked, and how their answers are read."""
