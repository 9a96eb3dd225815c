"""C beside Python: libraries of plain C sources, from a wheel or from the compiler at hand."""
