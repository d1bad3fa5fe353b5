// A cubin as read-only data, under its key. The assembler reads the file: a compiler that read the
// same bytes as an array would take minutes for the whole library.
#define IMAGE(key, path)                                                     \
    __asm__(".pushsection .rodata\n.balign 16\n.globl image_" #key           \
            "\n.hidden image_" #key "\nimage_" #key ":\n.incbin \"" path "\"\n.popsection")
