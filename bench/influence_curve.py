def curve_rows(*a):
    return []
