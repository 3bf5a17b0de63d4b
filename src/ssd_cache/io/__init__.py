"""Files and text that anyone may have written: checked while read, shown in messages, escaped, written whole or not.

It does not know what the files mean.
"""
