def cost_rows(*a):
    return []
