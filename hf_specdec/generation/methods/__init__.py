"""The methods: a file each, or a package where one file is not enough."""
