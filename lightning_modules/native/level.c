/* The level of x86-64 that this processor and its system have, of those that a wheel has libraries for; 0 below them. */
int level(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("x86-64-v4") ? 4
           : __builtin_cpu_supports("x86-64-v3") ? 3
           : __builtin_cpu_supports("x86-64-v2") ? 2
                                                 : 0;
}
