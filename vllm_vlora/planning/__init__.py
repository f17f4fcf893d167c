"""What every way of storing costs and loses, and the choice among them under a budget."""
