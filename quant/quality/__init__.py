"""How far a quantized model is from its original: metrics, statistics, reports and charts."""
