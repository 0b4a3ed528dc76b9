"""The language both halves of moelab speak: plain data, with no torch and no Django."""
